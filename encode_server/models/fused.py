"""Parts of transformers' towers in fewer passes over memory: root-mean-square norms, attention with rotary positions,
and the product before a GELU. Each computes what the part computes that it replaces.

A GPU spends more time on these parts of a bfloat16 tower, kernel by kernel in float32, than on its matrix products.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from encode_server.models.attention import Segments, attend_packed, layout_of
from encode_server.models.linear import joined, replace_modules
from encode_server.models.rotary import Rotation, choose_rotation, rotate

_ROTARY = "apply_rotary_pos_emb_vision"
_FIRST = ("linear_fc1", "fc1")
_ACTIVATIONS = ("act_fn", "act", "activation_fn")


class RmsNorm(nn.Module):
    """`hidden / sqrt(mean(hidden²) + eps) × weight` in one kernel, rounded once; transformers rounds twice."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., width] → [..., width]."""
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class RotaryAttention(nn.Module):
    """Self-attention of a vision tower over packed segments: one projection to q, k and v, rotated in place."""

    def __init__(self, attention: Any, rotation: Rotation) -> None:
        """`attention`: transformers' module, as `_is_rotary` recognises it."""
        super().__init__()
        self.qkv = attention.qkv if hasattr(attention, "qkv") else joined(attention.q, attention.k, attention.v)
        self.proj = attention.proj
        self._heads = int(attention.num_heads)
        self._scaling = float(attention.scaling)
        self._rotate = rotation

    def forward(
        self,
        hidden_states: torch.Tensor,
        cu_seqlens: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        segments: Sequence[Segments] = (),
        **_: Any,
    ) -> torch.Tensor:
        """[tokens, width] → [tokens, width]. `cu_seqlens`: boundaries of the segments, of which `segments` holds the
        layout if the caller has made it. `position_embeddings`: cosines and sines, [tokens, dim] each."""
        tokens = hidden_states.shape[0]
        qkv = self.qkv(hidden_states).view(tokens, 3, self._heads, -1)
        cos, sin = position_embeddings
        self._rotate(qkv[:, :2], cos.float(), sin.float())
        q, k, v = qkv.unbind(1)
        output = attend_packed(q, k, v, layout_of(cu_seqlens, segments), self._scaling)
        return self.proj(output.reshape(tokens, -1))  # type: ignore[no-any-return]


class GeluLinear(nn.Module):
    """A Linear and the tanh form of GELU behind it: one kernel on CUDA, where cuBLAS applies GELU to the sums."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        if not hidden.is_cuda:
            return functional.gelu(self.linear(hidden), approximate="tanh")
        weight, bias = self.linear.weight, self.linear.bias
        rows = hidden.reshape(-1, weight.shape[1])
        return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True).view(*hidden.shape[:-1], -1)


def fuse_norms(model: nn.Module) -> None:
    """Every root-mean-square norm of `model` becomes an `RmsNorm`."""
    replace_modules(model, _is_rms_norm, lambda norm: RmsNorm(norm.weight, _epsilon(norm)))


def fuse_rotary(model: nn.Module, device: torch.device) -> None:
    """Every vision attention with rotary positions becomes a `RotaryAttention`; `device`: where it will run."""
    if not any(map(_is_rotary, model.modules())):
        return
    rotation = choose_rotation(device) if device.type == "cuda" else rotate
    replace_modules(model, _is_rotary, lambda attention: RotaryAttention(attention, rotation))


def fuse_gelu(model: nn.Module) -> None:
    """The first Linear of every MLP with the tanh form of GELU becomes a `GeluLinear`."""
    for module in list(model.modules()):
        first = next((name for name in _FIRST if type(getattr(module, name, None)) is nn.Linear), None)
        activation = next((name for name in _ACTIVATIONS if _is_tanh_gelu(getattr(module, name, None))), None)
        if first is not None and activation is not None and getattr(module, first).bias is not None:
            setattr(module, first, GeluLinear(getattr(module, first)))
            setattr(module, activation, nn.Identity())


def _is_rms_norm(module: nn.Module) -> bool:
    """By name and form; whether it computes what its name says is for `generic.discover` and the tests to show."""
    return (
        type(module).__name__.endswith("RMSNorm")
        and [name for name, _ in module.named_parameters()] == ["weight"]
        and isinstance(module.weight, nn.Parameter)
        and module.weight.dim() == 1
        and _epsilon(module) > 0
        and len(inspect.signature(type(module).forward).parameters) == 2
    )


def _epsilon(module: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(module, name, None), float):
            return value
    return 0.0


def _is_rotary(module: nn.Module) -> bool:
    """Packed self-attention whose code rotates whole heads, and which has no parameters beside its Linears."""
    forward = inspect.unwrap(type(module).forward)  # transformers 5.17 wraps Qwen2.5-Omni's to rename an argument
    names = {name for name, _ in module.named_children()}
    return (
        _ROTARY in getattr(forward, "__globals__", {})
        and names in ({"qkv", "proj"}, {"q", "k", "v", "proj"})
        and {"hidden_states", "cu_seqlens", "position_embeddings"} <= set(inspect.signature(forward).parameters)
        and isinstance(getattr(module, "num_heads", None), int)
        and isinstance(getattr(module, "scaling", None), float)
        and all(type(getattr(module, name)) is nn.Linear for name in names - {"proj"})
    )


def _is_tanh_gelu(module: object) -> bool:
    if isinstance(module, nn.GELU):
        return module.approximate == "tanh"
    return type(module).__name__ in ("GELUTanh", "PytorchGELUTanh")
