"""A checkpoint whose language model is quantised: its encoder is the one before quantisation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from encode_server.errors import StartupError
from encode_server.media.limits import MediaLimits
from encode_server.models.encoder import load_encoder
from encode_server.models.inspect import inspect
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import resolve
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints
from tests.models import samples

METHODS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "compressed": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


@pytest.fixture(params=["qwen2_5_vl", "qwen2_5_omni", "qwen2_audio"])
def original(request: pytest.FixtureRequest, checkpoints: Checkpoints) -> Path:
    return checkpoints.path(request.param)


def _quantised(original: Path, copy: Path, setting: dict[str, Any], *, inside: str | None = None) -> Path:
    """`original` as a quantiser leaves it: the language model's Linears packed, config.json saying so."""
    shutil.copytree(original, copy)
    weights = {}
    for name, weight in load_file(original / "model.safetensors").items():
        if "layers." in name and "tower" not in name and name.endswith("proj.weight"):
            weights[name.replace(".weight", ".qweight")] = torch.zeros(4, 4, dtype=torch.int32)
            weights[name.replace(".weight", ".scales")] = torch.ones(4, 4)
        else:
            weights[name] = weight.clone()
    assert any(name.endswith("qweight") for name in weights)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (config[inside] if inside else config)["quantization_config"] = setting
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def _embedding(path: Path) -> torch.Tensor:
    preprocessor = Preprocessor(resolve(str(path)), MediaLimits())
    hears = Modality.IMAGE not in preprocessor.modalities
    modality, data = (Modality.AUDIO, samples.wav(0.5)) if hears else (Modality.IMAGE, samples.png(60, 90))
    encoder = load_encoder(str(path), device="cpu", dtype="float32")
    return encoder.forward(modality, [preprocessor.prepare(modality, data).tensors])[0]


@pytest.mark.parametrize("method", METHODS)
def test_its_encoder_loads(original: Path, tmp_path: Path, method: str) -> None:
    copy = _quantised(original, tmp_path / "copy", METHODS[method])
    assert inspect((str(copy), None, 1)).dtype == "float32"
    assert torch.equal(_embedding(copy), _embedding(original))


def test_the_setting_may_stand_in_a_part_of_the_configuration(checkpoints: Checkpoints, tmp_path: Path) -> None:
    original = checkpoints.path("qwen2_5_omni")
    copy = _quantised(original, tmp_path / "copy", METHODS["awq"], inside="thinker_config")
    assert torch.equal(_embedding(copy), _embedding(original))


@pytest.mark.parametrize(
    ("suffix", "dtype", "message"),
    [
        ("qweight", torch.int32, r"visual\.blocks\.1\.mlp\.gate_proj\.qweight is I32"),
        ("weight", torch.float8_e4m3fn, r"visual\.blocks\.1\.mlp\.gate_proj\.weight is F8_E4M3"),
        ("weight", torch.int8, r"visual\.blocks\.1\.mlp\.gate_proj\.weight is I8"),
        ("weight_scale", torch.float32, r"visual\.blocks\.1\.mlp\.gate_proj\.weight_scale is F32"),
    ],
)
def test_a_quantised_encoder_is_refused_in_one_line(
    checkpoints: Checkpoints, tmp_path: Path, suffix: str, dtype: torch.dtype, message: str
) -> None:
    copy = Path(shutil.copytree(checkpoints.path("qwen2_5_vl"), tmp_path / "copy"))
    weights = {name: weight.clone() for name, weight in load_file(copy / "model.safetensors").items()}
    weights.pop("visual.blocks.1.mlp.gate_proj.weight")
    weights[f"visual.blocks.1.mlp.gate_proj.{suffix}"] = torch.zeros(8, 8).to(dtype)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    for attempt in (
        lambda: inspect((str(copy), None, 1)),
        lambda: load_encoder(str(copy), device="cpu", dtype="float32"),
    ):
        with pytest.raises(StartupError, match=message) as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_indices_that_old_checkpoints_hold_are_no_quantisation(checkpoints: Checkpoints, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoints.path("clip"), tmp_path / "copy"))
    weights = {name: weight.clone() for name, weight in load_file(copy / "model.safetensors").items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(17, dtype=torch.int32)[None]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    load_encoder(str(copy), device="cpu", dtype="float32")
