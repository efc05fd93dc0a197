"""Gated MLPs in fewer kernels: the values of transformers' own, whatever is named like one and is none left alone."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.dinov2.modeling_dinov2 import Dinov2SwiGLUFFN
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionPatchMerger
from transformers.models.pixtral.modeling_pixtral import PixtralMLP
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from encode_server.models import gated
from encode_server.models.encoder import load_encoder
from encode_server.models.gated import ACTIVATIONS, GatedMlp, choose_gate, fuse_gated, gate
from encode_server.models.linear import align_mlps
from encode_server.models.parallel import shard
from tests.checkpoints import Checkpoints

CPU = torch.device("cpu")
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""transformers' names of the activations."""
SLOW = ["gelu", "gelu_tanh"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def _mlp(activation: str = "silu", *, width: int = 86, bias: bool = True) -> nn.Module:
    config = SimpleNamespace(hidden_size=32, intermediate_size=width, hidden_act=activation)
    mlp = Qwen2_5_VLMLP(config, bias=bias).requires_grad_(False)
    for weight in mlp.parameters():
        weight.normal_(0, 0.3)
    return mlp


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_gated_mlp_keeps_its_values(activation: str, bias: bool) -> None:
    plain = _mlp(NAMES[activation], bias=bias)
    model = nn.ModuleDict({"mlp": plain})
    fuse_gated(model, CPU)
    assert isinstance(model["mlp"], GatedMlp)
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 2
    for shape in ((7, 32), (2, 3, 32), (0, 32)):
        hidden = torch.randn(shape) * 3
        torch.testing.assert_close(model["mlp"](hidden), plain(hidden), atol=1e-5, rtol=1e-5)


def test_in_bfloat16_the_error_is_no_larger_than_that_of_transformers() -> None:
    plain = _mlp(width=512)
    hidden = torch.randn(200, 32).bfloat16()
    exact = plain.double()(hidden.double())
    model = nn.ModuleDict({"mlp": plain.bfloat16()})
    theirs = plain(hidden)
    fuse_gated(model, CPU)
    error, usual = ((found.double() - exact).norm() / exact.norm() for found in (model["mlp"](hidden), theirs))
    # The weights' own rounding is in both.
    assert error <= usual * 1.05 < 0.01


@pytest.mark.parametrize("kind", ["Pixtral", "DINOv2", "w1, w2, w3", "gate and up in one Linear"])
def test_gated_mlps_of_other_families(kind: str) -> None:
    class Llama(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(32, 64), nn.Linear(32, 64, bias=False), nn.Linear(64, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w2(functional.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj, self.act = nn.Linear(32, 128), nn.Linear(64, 32), ACT2FN["silu"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            return self.down_proj(up * self.act(gate))  # type: ignore[no-any-return]

    config = SimpleNamespace(hidden_size=32, intermediate_size=64, hidden_act="gelu", mlp_ratio=4)
    made = {"Pixtral": lambda: PixtralMLP(config), "DINOv2": lambda: Dinov2SwiGLUFFN(config), "w1, w2, w3": Llama}
    plain = made.get(kind, Packed)().eval()
    model = nn.ModuleDict({"mlp": plain})
    fuse_gated(model, CPU)
    assert isinstance(model["mlp"], GatedMlp)
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(model["mlp"](hidden), plain(hidden), atol=1e-5, rtol=1e-5)


class _Clamped(Qwen2_5_VLMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x).clamp(max=7.0), self.up_proj(x).clamp(-7.0, 7.0)
        return self.down_proj(self.act_fn(gate) * up)  # type: ignore[no-any-return]


class _Scaled(Qwen2_5_VLMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.5  # type: ignore[no-any-return]


class _Swapped(Qwen2_5_VLMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))  # type: ignore[no-any-return]


class _Routed(Qwen2_5_VLMLP):
    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * weights  # type: ignore[no-any-return]


class _Quantised(nn.Linear):
    pass


def _others() -> dict[str, nn.Module]:
    config = SimpleNamespace(hidden_size=32, intermediate_size=64, hidden_act="silu")
    made: dict[str, Any] = {kind.__name__: kind(config) for kind in (_Clamped, _Scaled, _Swapped, _Routed)}
    made["another activation"] = Qwen2_5_VLMLP(SimpleNamespace(**{**vars(config), "hidden_act": "relu"}))
    made["a norm in between"] = Glm4vVisionPatchMerger(32, 64, "silu")
    made["quantised"] = Qwen2_5_VLMLP(config)
    made["quantised"].gate_proj = _Quantised(32, 64)
    made["two dtypes"] = Qwen2_5_VLMLP(config)
    made["two dtypes"].gate_proj.half()
    return made


@pytest.mark.parametrize("kind", _others())
def test_what_computes_something_else_is_left_alone(kind: str) -> None:
    model = nn.ModuleDict({"mlp": _others()[kind]})
    fuse_gated(model, CPU)
    assert not any(isinstance(module, GatedMlp) for module in model.modules())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_parts_of_a_gated_mlp_add_up(world: int) -> None:
    """A width that the ranks do not divide, as on a GPU: filled up, cut, then fused."""
    hidden = torch.randn(5, 32)
    whole = _mlp(width=86)
    want, state = whole(hidden), whole.state_dict()
    bias, collectives = whole.down_proj.bias.clone(), list[torch.Tensor]()
    total = torch.zeros_like(want)
    for rank in range(world):
        part = _mlp(width=86)
        part.load_state_dict(state)
        model = nn.ModuleDict({"mlp": part})
        align_mlps(model, world)
        shard(model, rank=rank, world=world, reduce=collectives.append)
        fuse_gated(model, CPU)
        assert isinstance(model["mlp"], GatedMlp)
        total += model["mlp"](hidden) - bias
    torch.testing.assert_close(total + bias, want, atol=1e-5, rtol=1e-5)
    assert len(collectives) == (world if world > 1 else 0)


def test_a_fused_tower_holds_its_weights_once_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a layer is fused, those before it have given their own weights back."""
    model = nn.ModuleList([_mlp() for _ in range(4)])
    before = [weakref.ref(mlp.gate_proj.weight) for mlp in model]
    alive: list[int] = []

    def counting(*linears: nn.Linear, real: Any = gated.joined) -> nn.Linear:
        alive.append(sum(weight() is not None for weight in before))
        return real(*linears)

    monkeypatch.setattr(gated, "joined", counting)
    fuse_gated(model, CPU)
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_the_triton_kernel_interpreted(activation: str, dtype: torch.dtype) -> None:
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    from encode_server.models.gated_triton import gate_kernel, launch

    kernel = interpreter.InterpretedFunction(gate_kernel.fn)
    for shape in ((2, 3, 2 * 1037), (1, 2 * 16), (0, 64)):
        gate_up = (torch.randn(shape) * 8).to(dtype)
        got = launch(kernel, gate_up, activation)
        want = gate(gate_up.float(), activation)
        assert got.shape == want.shape and got.dtype is dtype
        torch.testing.assert_close(got.float(), want, atol=1e-5, rtol=1e-5 if dtype is torch.float32 else 2**-7)


@pytest.mark.parametrize(
    ("backend", "arch", "warp"),
    [
        ("cuda", 90, 32),
        *(pytest.param("cuda", arch, 32, marks=pytest.mark.slow) for arch in (80, 86, 89, 100)),
        pytest.param("hip", "gfx942", 64, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("activation", ["silu", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_triton_kernel_compiles(backend: str, arch: Any, warp: int, activation: str) -> None:
    compiler = pytest.importorskip("triton.compiler", reason="Triton is not installed")
    from triton.backends.compiler import GPUTarget

    from encode_server.models.gated_triton import gate_kernel

    constants = {"ACTIVATION": activation, "BLOCK": 1024}
    types = {"gate_up": "*bf16", "out": "*bf16", "width": "i32"} | dict.fromkeys(constants, "constexpr")
    source = compiler.ASTSource(fn=gate_kernel, signature=types, constexprs=constants)
    compiled = compiler.compile(source, target=GPUTarget(backend, arch, warp))
    assert compiled.asm["cubin" if backend == "cuda" else "hsaco"]


def test_a_kernel_that_fails_or_is_wrong_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triton = pytest.importorskip("encode_server.models.gated_triton", reason="Triton is not installed")
    monkeypatch.setattr(gated, "check", lambda candidate, device, names, real=gated.check: real(candidate, CPU, names))
    cuda = torch.device("cuda:0")
    assert choose_gate(CPU, ACTIVATIONS) is gate
    assert choose_gate(cuda, ACTIVATIONS) is triton.gate_in_one_kernel

    def halves_swapped(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        return gate(gate_up.roll(gate_up.shape[-1] // 2, -1), activation)

    monkeypatch.setattr(triton, "gate_in_one_kernel", halves_swapped)
    assert choose_gate(cuda, ["silu"]) is gate
    assert "off by" in caplog.text and "gated MLPs take two kernels" in caplog.text


def test_a_whole_encoder_with_gated_mlps_fused(checkpoints: Checkpoints) -> None:
    encoder = load_encoder(str(checkpoints.path("qwen2_5_vl")), device="cpu", dtype="float32")
    model: Any = encoder._model
    layers = sum(isinstance(module, Qwen2_5_VLMLP) for module in model.modules())
    fuse_gated(model, CPU)
    fused = [module for module in model.modules() if isinstance(module, GatedMlp)]
    assert layers == len(fused) > 1
