"""Linears and patch embeddings in their fast forms compute what the slow ones do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from encode_server.models.linear import WORTH_PACKING, PackedLinear, PatchEmbedding, align_mlps, pack_linears


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


@pytest.mark.parametrize("world", [1, 2, 8])
def test_mlps_of_an_odd_width_become_wider_and_compute_the_same(world: int) -> None:
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionMLP

    torch.manual_seed(0)
    gated = Qwen2_5_VLMLP(Qwen2_5_VLVisionConfig(hidden_size=32, intermediate_size=342), bias=True)
    plain = Qwen3VLVisionMLP(Qwen3VLVisionConfig(hidden_size=32, intermediate_size=99))
    hidden = torch.randn(7, 32)
    with torch.inference_mode():
        want = [mlp(hidden) for mlp in (gated, plain)]
        align_mlps(nn.ModuleList([gated, plain]), world)
        for mlp, expected in zip((gated, plain), want, strict=True):
            torch.testing.assert_close(mlp(hidden), expected, atol=1e-6, rtol=1e-5)
    for linear in (gated.gate_proj, gated.up_proj, gated.down_proj.weight.T, plain.linear_fc1):
        width = len(getattr(linear, "weight", linear))
        assert width % (16 * world) == 0 and width - 342 < 16 * world


def test_mlps_of_an_even_width_are_left_alone() -> None:
    mlp = nn.ModuleDict({"fc1": nn.Linear(8, 64), "fc2": nn.Linear(64, 8)})
    weights = [mlp[name].weight for name in ("fc1", "fc2")]
    align_mlps(mlp, 4)
    assert all(mlp[name].weight is weight for name, weight in zip(("fc1", "fc2"), weights, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_a_patch_embedding(bias: bool) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv3d(3, 96, (2, 14, 14), stride=(2, 14, 14), bias=bias)
    patches = torch.randn(37, 3 * 2 * 14 * 14)
    with torch.inference_mode():
        want = convolution(patches.view(-1, 3, 2, 14, 14)).flatten(1)
        torch.testing.assert_close(PatchEmbedding(convolution)(patches), want, atol=1e-5, rtol=1e-5)
