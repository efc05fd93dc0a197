"""Gated MLPs, `down(act(gate(x)) × up(x))`, with one product in place of two and one kernel between the products."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from encode_server.models.choice import choose
from encode_server.models.linear import joined, replace_modules

Gate = Callable[[torch.Tensor, str], torch.Tensor]
"""[..., 2 × width] → [..., width], contiguous: the activation of the first half, times the second half. The activation
is one of the names of `ACTIVATIONS`."""

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}

_FORMS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("w1", "w3"), "w2"),
    (("gate_up_proj",), "down_proj"),
    (("weights_in",), "weights_out"),
)
"""Names of the Linears into a gated MLP, gate first, or of the one Linear that is both, and of the Linear out of it."""

_PROBES = (0.0, 0.01, -0.3, 0.7, -1.5, 3.0, -6.0, 11.0, -40.0, 150.0, -3e3, 2e4)
"""Values for gate and up. The large ones show an MLP that clamps."""


def gate(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """As `Gate` says, in two kernels."""
    first, second = gate_up.chunk(2, dim=-1)
    return ACTIVATIONS[activation](first).mul_(second)


def choose_gate(device: torch.device, activations: Collection[str]) -> Gate:
    """The fastest gate that works on `device`: Triton's if it gives the values of `gate` there for `activations`."""

    def in_one_kernel() -> Gate:
        from encode_server.models.gated_triton import gate_in_one_kernel

        check(gate_in_one_kernel, device, activations)
        return gate_in_one_kernel

    plain: Gate = gate
    return choose(device, plain, in_one_kernel, "gated MLPs take two kernels between their products")


def check(candidate: Gate, device: torch.device, activations: Collection[str]) -> None:
    """Raise ValueError where `candidate` does not give the values of `gate`, for `activations`, two dtypes and an
    uneven width. Each activation is a kernel of its own to compile."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        gate_up = (torch.randn(5, 2 * 1037, generator=generator) * 3).to(dtype)
        for activation in activations:
            want = gate(gate_up.float(), activation)
            error = (candidate(gate_up.to(device), activation).cpu().float() - want).abs()
            # A GPU's exponential and error functions are off by some units in the last place.
            step = 1e-5 if dtype is torch.float32 else 2**-7
            if not bool((error <= step * want.abs() + 1e-5).all()):
                raise ValueError(f"{activation} is off by {float(error.max()):.1e} in {dtype}")


class GatedMlp(nn.Module):
    """`out(act(gate(x)) × up(x))`, gate and up being the halves of what one Linear puts out."""

    def __init__(self, into: nn.Linear, out: nn.Module, activation: str, gate: Gate) -> None:
        super().__init__()
        self.into, self.out = into, out
        self._activation, self._gate = activation, gate

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., width] → [..., width]."""
        return self.out(self._gate(self.into(hidden), self._activation))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Form:
    """Names of the Linears of a gated MLP, as in `_FORMS`, and of its activation."""

    into: tuple[str, ...]
    out: str
    activation: str


def fuse_gated(model: nn.Module, device: torch.device) -> None:
    """Every gated MLP becomes a `GatedMlp`; `device`: where it will run. Ranks cut their part out before."""
    activations = {form.activation for module in model.modules() if (form := _form_of(module)) is not None}
    if not activations:
        return
    chosen = choose_gate(device, activations)

    def make(module: Any) -> nn.Module:
        form = _form_of(module)
        assert form is not None
        linears = [getattr(module, name) for name in form.into]
        into = linears[0] if len(linears) == 1 else joined(*linears)
        return GatedMlp(into, getattr(module, form.out), form.activation, chosen)

    replace_modules(model, lambda module: _form_of(module) is not None, make)


def _form_of(module: nn.Module) -> _Form | None:
    """How `module` is a gated MLP; None: it is not, or computes more than a gated MLP does."""
    children = dict(module.named_children())
    for into, out in _FORMS:
        linears = [children.get(name) for name in into]
        if out not in children or not _go_together(linears):
            continue
        for activation in ACTIVATIONS:
            if _computes(module, into, out, activation):
                return _Form(into, out, activation)
    return None


def _go_together(linears: Sequence[nn.Module | None]) -> bool:
    """Whether they are Linears, and could be one. Not of a subclass: a quantised Linear has another weight."""
    if not all(type(linear) is nn.Linear for linear in linears):
        return False
    return len({(linear.weight.shape, linear.weight.dtype) for linear in linears if isinstance(linear, nn.Linear)}) == 1


class _Columns(nn.Module):
    """Stands for a Linear: some of the columns that it is given."""

    def __init__(self, columns: slice) -> None:
        super().__init__()
        self._columns = columns

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, columns] → [rows, some of them]."""
        return hidden[:, self._columns]


def _computes(module: nn.Module, into: Sequence[str], out: str, activation: str) -> bool:
    """Whether `module`, its Linears left out, gives what `gate` gives. Shows clamps, factors and norms in between."""
    everything = slice(None)
    columns = [slice(0, 1), slice(1, 2)] if len(into) == 2 else [everything]
    stand_ins = {name: _Columns(part) for name, part in zip((*into, out), (*columns, everything), strict=True)}
    probed = copy.copy(module)
    probed.__dict__["_modules"] = {**module._modules, **stand_ins}
    values = torch.tensor(_PROBES, device="cpu")
    gate_up = torch.cartesian_prod(values, values)
    try:
        with torch.no_grad():
            got: object = probed(gate_up)
    except Exception:
        return False  # It takes something else, or does something else with it.
    want = gate(gate_up, activation)
    return isinstance(got, torch.Tensor) and got.shape == want.shape and torch.allclose(got.float(), want, 1e-5, 1e-6)
