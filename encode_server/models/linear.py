"""Linear layers in the form their device multiplies fastest. What they compute stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

WORTH_PACKING = 1 << 17  # elements of a weight: below, a call of oneDNN's costs more than its product saves
PACKED_FOR = 1024  # rows a weight is laid out for; products of more or fewer rows are as right
ALIGNED = 16  # elements: rows of a half-precision weight then begin at multiples of 32 bytes
_MLPS = ((("gate_proj", "up_proj"), "down_proj"), (("fc1",), "fc2"), (("linear_fc1",), "linear_fc2"))


class PackedLinear(nn.Module):
    """A Linear on a CPU, its weight laid out by oneDNN once, when it is loaded.

    torch's own float32 products are MKL's, which reaches 60 to 90 per cent of what an AMD core can do, and oneDNN 95 to
    100; bfloat16 ones are oneDNN's anyway. The operator is the one torch's inductor puts in place of frozen Linears.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), PACKED_FOR)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., in] → [..., out]."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._weight, self._bias, "none", [], "")
        return output


class PatchEmbedding(nn.Module):
    """A convolution over patches that neither overlap nor leave gaps, as the one product it is.

    oneDNN computes such a convolution at a quarter of the speed of the product.
    """

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        weight = convolution.weight.detach().flatten(1)
        self.product = nn.Linear(weight.shape[1], weight.shape[0], bias=convolution.bias is not None, device="meta")
        self.product.weight = nn.Parameter(weight, requires_grad=False)
        if convolution.bias is not None:
            self.product.bias = nn.Parameter(convolution.bias.detach(), requires_grad=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[patches, channels × frames × height × width] → [patches, width]."""
        return self.product(patches)  # type: ignore[no-any-return]


def replace_patch_convolutions(model: nn.Module) -> None:
    """Every `patch_embed` of `model` that is a 3D convolution becomes a `PatchEmbedding`."""
    for name, module in list(model.named_modules()):
        convolution = getattr(module, "proj", None)
        if name.rpartition(".")[2] == "patch_embed" and isinstance(convolution, nn.Conv3d):
            model.set_submodule(name, PatchEmbedding(convolution))


def joined(*linears: nn.Linear) -> nn.Linear:
    """One Linear that computes what `linears` compute, their outputs one after another."""
    width = sum(linear.out_features for linear in linears)
    biases = [linear.bias for linear in linears]
    one = nn.Linear(linears[0].in_features, width, bias=any(bias is not None for bias in biases), device="meta")
    one.weight = nn.Parameter(torch.cat([linear.weight.detach() for linear in linears]), requires_grad=False)
    if one.bias is not None:
        zeros = [torch.zeros_like(linear.weight[:, 0]) for linear in linears]
        biases = [zero if bias is None else bias for zero, bias in zip(zeros, biases, strict=True)]
        one.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]), requires_grad=False)
    return one


def replace_modules(model: nn.Module, recognise: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> None:
    """Every module inside `model` that `recognise` knows becomes what `make` makes of it, one after another: nothing
    else holds the weights of a module that has been replaced."""
    for name in [name for name, module in model.named_modules() if name and recognise(module)]:
        model.set_submodule(name, make(model.get_submodule(name)))


def align_mlps(model: nn.Module, world: int) -> None:
    """Widen the MLPs of `model` with zeros, until each of `world` ranks keeps a multiple of `ALIGNED` of the width.

    A GPU multiplies fast only what is aligned in memory, and Qwen2.5-VL's width is 3420. Activations of zero are zero
    and meet weights of zero, so nothing changes but the order in which sums are taken.
    """
    for module in list(model.modules()):
        for names_in, name_out in _MLPS:
            found = [getattr(module, name, None) for name in (*names_in, name_out)]
            linears = [linear for linear in found if isinstance(linear, nn.Linear)]
            if len(linears) == len(found):
                *into, out = linears
                _widen(into, out, -out.in_features % (ALIGNED * world))


def _widen(into: Sequence[nn.Linear], out: nn.Linear, extra: int) -> None:
    if not extra or any(linear.out_features != out.in_features for linear in into):
        return
    for linear in into:
        linear.weight = nn.Parameter(functional.pad(linear.weight.detach(), (0, 0, 0, extra)), requires_grad=False)
        if linear.bias is not None:
            linear.bias = nn.Parameter(functional.pad(linear.bias.detach(), (0, extra)), requires_grad=False)
        linear.out_features += extra
    out.weight = nn.Parameter(functional.pad(out.weight.detach(), (0, extra)), requires_grad=False)
    out.in_features += extra


def pack_linears(model: nn.Module) -> None:
    """Every large float32 Linear of `model`, which must stay on the CPU, becomes a `PackedLinear`."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for name, module in list(model.named_modules()):
        # Not of a subclass: others read the weight of these themselves.
        if type(module) is not nn.Linear or module.weight.dtype is not torch.float32:
            continue
        if module.weight.numel() >= WORTH_PACKING:
            model.set_submodule(name, PackedLinear(module))
