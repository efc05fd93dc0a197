"""Linear layers in the form their device multiplies fastest. What they compute stays the same."""

from __future__ import annotations

import torch
from torch import nn

WORTH_PACKING = 1 << 17  # elements of a weight: below, a call of oneDNN's costs more than its product saves
PACKED_FOR = 1024  # rows a weight is laid out for; products of more or fewer rows are as right


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
