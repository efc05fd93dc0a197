"""Fused parts compute what transformers' own compute: in float32 to the last bits, in bfloat16 at least as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.qwen2_5_omni import configuration_qwen2_5_omni, modeling_qwen2_5_omni
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLRMSNorm,
    Qwen2_5_VLVisionAttention,
    apply_rotary_pos_emb_vision,
)

from encode_server.models import rotary, speedups
from encode_server.models.attention import Segments, use_segment_attention
from encode_server.models.convolutions import AudioConvolution, replace_audio_convolutions
from encode_server.models.fused import GeluLinear, RmsNorm, RotaryAttention, fuse_gelu, fuse_norms, fuse_rotary
from encode_server.models.rotary import rotate
from encode_server.models.speedups import Speedup

CPU = torch.device("cpu")
LENGTHS = [7, 12, 7]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def _angles(tokens: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.randn(tokens, dim // 2).mul(3).repeat(1, 2)
    return angles.cos(), angles.sin()


def _states(dtype: torch.dtype, dim: int = 80) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (torch.randn(11, 3, 4, dim).to(dtype), *_angles(11, dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [80, 72, 64])
def test_rotary_positions_in_place(dtype: torch.dtype, dim: int) -> None:
    qkv, cos, sin = _states(dtype, dim)
    q, k = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin)
    v = qkv[:, 2].clone()
    rotate(qkv[:, :2], cos, sin)
    for got, want in zip(qkv.unbind(1), (q, k, v), strict=True):
        tolerance = 1e-6 if dtype is torch.float32 else 2**-7  # one step of rounding
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_rotary_positions_whose_halves_differ() -> None:
    qkv, _, _ = _states(torch.float32)
    cos, sin = torch.randn(2, 11, 80)
    q, k = apply_rotary_pos_emb_vision(qkv[:, 0], qkv[:, 1], cos, sin)
    rotate(qkv[:, :2], cos, sin)
    torch.testing.assert_close(qkv[:, :2], torch.stack([q, k], 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [80, 72])
def test_the_triton_kernel_interpreted(dtype: torch.dtype, dim: int) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    from encode_server.models.rotary_triton import launch, rotate_kernel

    qkv, cos, sin = _states(dtype, dim)
    want = qkv.clone()
    rotate(want[:, :2], cos, sin)
    launch(interpreter.InterpretedFunction(rotate_kernel.fn), qkv[:, :2], cos, sin)
    torch.testing.assert_close(qkv, want, atol=1e-6 if dtype is torch.float32 else 2**-7, rtol=2**-7)


@pytest.mark.parametrize(
    ("backend", "arch", "warp"),
    [
        ("cuda", 90, 32),
        *(pytest.param("cuda", arch, 32, marks=pytest.mark.slow) for arch in (80, 86, 89, 100)),
        pytest.param("hip", "gfx942", 64, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dim", [80, pytest.param(72, marks=pytest.mark.slow)])
def test_the_triton_kernel_compiles(backend: str, arch: Any, warp: int, dim: int) -> None:
    compiler = pytest.importorskip("triton.compiler", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget

    from encode_server.models.rotary_triton import rotate_kernel

    types = {"qk": "*bf16", "cos": "*fp32", "sin": "*fp32"}
    types |= dict.fromkeys(("stride_token", "stride_part", "stride_head"), "i32")
    constants = {"HEADS": 16, "HALF": dim // 2, "BLOCK": 64}
    source = compiler.ASTSource(
        fn=rotate_kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    compiled = compiler.compile(source, target=GPUTarget(backend, arch, warp))
    assert compiled.asm["cubin" if backend == "cuda" else "hsaco"]


def test_a_kernel_that_fails_or_is_wrong_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triton = pytest.importorskip("encode_server.models.rotary_triton", reason="Triton is not installed")
    monkeypatch.setattr(rotary, "check", lambda rotation, device, real=rotary.check: real(rotation, CPU))
    cuda = torch.device("cuda:0")
    assert rotary.choose_rotation(CPU) is rotate
    assert rotary.choose_rotation(cuda) is triton.rotate_in_one_kernel

    def without_compiler(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        raise RuntimeError("Failed to find C compiler.")

    def turned_back(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        rotate(qk, cos, -sin)

    for broken, reason in ((without_compiler, "C compiler"), (turned_back, "off by")):
        monkeypatch.setattr(triton, "rotate_in_one_kernel", broken)
        caplog.clear()
        assert rotary.choose_rotation(cuda) is rotate
        assert reason in caplog.text and "four kernels" in caplog.text


def test_root_mean_square_norms() -> None:
    plain = Qwen2_5_VLRMSNorm(96)
    plain.weight.data.normal_(1, 0.1)
    hidden = torch.randn(50, 96) * 3
    model = nn.ModuleDict({"norm": plain})
    fuse_norms(model)
    assert isinstance(model["norm"], RmsNorm)
    torch.testing.assert_close(model["norm"](hidden), plain(hidden), atol=2e-6, rtol=2e-6)

    half = hidden.bfloat16()
    plain.bfloat16()
    exact = half.double() * torch.rsqrt(half.double().pow(2).mean(-1, keepdim=True) + 1e-6) * plain.weight.double()
    error, theirs = ((found.double() - exact).norm() / exact.norm() for found in (model["norm"](half), plain(half)))
    assert error <= theirs < 0.004


def test_norms_of_another_form_are_left_alone() -> None:
    class GatedRMSNorm(Qwen2_5_VLRMSNorm):
        def forward(self, hidden_states: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) * gate

    model = nn.ModuleDict({"gated": GatedRMSNorm(8), "layer": nn.LayerNorm(8)})
    fuse_norms(model)
    assert not any(isinstance(module, RmsNorm) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["fused qkv", "q, k and v apart"])
def test_attention_with_rotary_positions(kind: str, dtype: torch.dtype) -> None:
    if kind == "fused qkv":
        plain: nn.Module = Qwen2_5_VLVisionAttention(Qwen2_5_VLVisionConfig(hidden_size=64, num_heads=4))
    else:
        config = configuration_qwen2_5_omni.Qwen2_5OmniVisionEncoderConfig(hidden_size=64, num_heads=4)
        plain = modeling_qwen2_5_omni.Qwen2_5OmniVisionAttention(config)
    model = nn.ModuleDict({"attn": plain.to(dtype).eval()})
    use_segment_attention(model)
    layout = Segments(LENGTHS, CPU)
    hidden = torch.randn(sum(LENGTHS), 64).to(dtype)
    given = {"cu_seqlens": layout.cu_seqlens, "max_seqlen": 12, "position_embeddings": _angles(sum(LENGTHS), 16)}
    with torch.inference_mode():
        want = plain(hidden, segments=(layout,), **given)
        fuse_rotary(model, CPU)
        assert isinstance(model["attn"], RotaryAttention)
        got = model["attn"](hidden, segments=(layout,), **given)
        alone = model["attn"](hidden, **given)  # as families call it that know no layouts
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(alone, got, atol=0, rtol=0)


def test_gelu_behind_a_product() -> None:
    mlp = nn.ModuleDict({"fc1": nn.Linear(8, 24), "act_fn": ACT2FN["gelu_pytorch_tanh"], "fc2": nn.Linear(24, 8)})
    exact = nn.ModuleDict({"fc1": nn.Linear(8, 24), "act_fn": ACT2FN["gelu"], "fc2": nn.Linear(24, 8)})
    hidden = torch.randn(2, 5, 8)
    want = mlp["act_fn"](mlp["fc1"](hidden))
    for module in (mlp, exact):
        fuse_gelu(module)
    assert isinstance(mlp["fc1"], GeluLinear) and isinstance(mlp["act_fn"], nn.Identity)
    torch.testing.assert_close(mlp["act_fn"](mlp["fc1"](hidden)), want, atol=1e-6, rtol=1e-6)
    assert isinstance(exact["fc1"], nn.Linear), "cuBLAS has the tanh form alone"


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("length", [1, 8, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_audio_convolutions(stride: int, length: int, bias: bool) -> None:
    plain = nn.Conv1d(6, 10, 3, stride=stride, padding=1, bias=bias)
    model = nn.ModuleDict({"conv1": plain, "other": nn.Conv1d(6, 6, 3, groups=6)})
    replace_audio_convolutions(model)
    assert isinstance(model["conv1"], AudioConvolution) and isinstance(model["other"], nn.Conv1d)
    features = torch.randn(2, 6, length)
    torch.testing.assert_close(model["conv1"](features), plain(features), atol=1e-6, rtol=1e-5)
    assert model["conv1"].stride == plain.stride, "Whisper's encoder multiplies the strides"


def test_each_device_gets_what_makes_it_faster() -> None:
    every = frozenset(Speedup)
    on_cpu = speedups.for_device(every, CPU, torch.float32)
    assert on_cpu == {Speedup.SEGMENTS, Speedup.PATCHES, Speedup.ROTARY, Speedup.PACK}
    assert speedups.for_device(every, CPU, torch.bfloat16) == on_cpu - {Speedup.ROTARY}
    assert speedups.for_device(every, torch.device("cuda:0"), torch.bfloat16) == every - {Speedup.PACK}
