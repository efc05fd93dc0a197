"""Linears and patch embeddings in their fast forms compute what the slow ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from encode_server.models.linear import WORTH_PACKING, PackedLinear, PatchEmbedding, pack_linears


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 300), (1027, 300), (1, 33, 300), (2, 5, 300)])
def test_a_packed_linear(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(300, 517, bias=bias)
    hidden = torch.randn(shape)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(plain)(hidden), plain(hidden), atol=1e-5, rtol=1e-5)


def test_a_packed_linear_takes_what_is_not_contiguous() -> None:
    plain = nn.Linear(300, 517)
    hidden = torch.randn(300, 40).T
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(plain)(hidden), plain(hidden), atol=1e-5, rtol=1e-5)


def test_small_linears_other_dtypes_and_subclasses_are_left_alone() -> None:
    model = nn.ModuleDict(
        {
            "large": nn.Linear(WORTH_PACKING // 256, 256),
            "small": nn.Linear(WORTH_PACKING // 256 - 1, 256),
            "narrow": nn.Linear(WORTH_PACKING // 256, 256, dtype=torch.bfloat16),
            "attention": nn.MultiheadAttention(512, 4),
        }
    )
    pack_linears(model)
    packed = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    assert packed == ["large"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_embedding(bias: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv3d(3, 96, (2, 14, 14), stride=(2, 14, 14), bias=bias)
    patches = torch.randn(37, 3 * 2 * 14 * 14)
    with torch.inference_mode():
        want = convolution(patches.view(-1, 3, 2, 14, 14)).flatten(1)
        torch.testing.assert_close(PatchEmbedding(convolution)(patches), want, atol=1e-5, rtol=1e-5)
