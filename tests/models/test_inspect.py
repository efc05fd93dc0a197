"""What a short-lived process finds out about a checkpoint before the ranks start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from encode_server.errors import StartupError
from encode_server.media.limits import MediaLimits
from encode_server.models.inspect import inspect, preload_modules
from encode_server.models.preprocess import Preprocessor
from encode_server.models.registry import ARCHITECTURES
from encode_server.models.resolve import resolve
from encode_server.wire.checkpoint import Inspection
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints
from tests.models.families.builders import write


def test_an_inspection_describes_the_checkpoint(checkpoints: Checkpoints) -> None:
    path = checkpoints.path("qwen2_5_omni")
    found = inspect((str(path), None, 2))
    assert found == msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=Inspection)
    assert (found.path, found.name, found.revision) == (str(path), str(path), "")
    assert (found.model_type, found.dtype) == ("qwen2_5_omni", "float32")
    assert found.modalities == [Modality.AUDIO, Modality.IMAGE, Modality.VIDEO]
    assert found.preload == preload_modules(str(path), None)


def test_the_probes_of_an_inspection_can_be_prepared(checkpoints: Checkpoints) -> None:
    path = checkpoints.path("qwen2_5_omni")
    preprocessor = Preprocessor(resolve(str(path)), MediaLimits())
    found = inspect((str(path), None, 1))
    assert sorted(found.probes) == found.modalities
    for modality, data in found.probes.items():
        assert preprocessor.prepare(modality, data).tokens >= 1


@pytest.mark.parametrize(
    ("name", "tp", "message"),
    [
        ("missing", 1, "no such directory"),
        ("unsupported", 1, "model_type 'llama' is not supported"),
        ("good", 3, "tp 3 does not divide the 4 attention heads of the vision tower"),
    ],
)
def test_what_cannot_work_is_one_line(
    checkpoints: Checkpoints, tmp_path: Path, name: str, tp: int, message: str
) -> None:
    (tmp_path / "unsupported").mkdir()
    (tmp_path / "unsupported/config.json").write_text('{"model_type": "llama"}')
    path = checkpoints.path("qwen2_5_vl") if name == "good" else tmp_path / name
    with pytest.raises(StartupError, match=message) as caught:
        inspect((str(path), None, tp))
    assert "\n" not in str(caught.value)


def _reshape(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    weights["visual.blocks.1.mlp.gate_proj.weight"] = torch.zeros(8, 8)


def _drop(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    del weights["visual.blocks.1.mlp.gate_proj.weight"]


def _shrink(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    config["vision_config"]["num_heads"] = "four"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_reshape, r"gate_proj\.weight in model\.safetensors has shape \[8, 8\], expected \[90, 64\]"),
        (_drop, r"lacks 1 encoder tensors: model\.visual\.blocks\.1\.mlp\.gate_proj\.weight"),
        (_shrink, "num_heads of the vision tower is 'four'"),
    ],
)
def test_a_bad_checkpoint_is_found_out_before_a_rank_starts(
    checkpoints: Checkpoints, tmp_path: Path, damage: Callable[..., None], message: str
) -> None:
    copy = Path(shutil.copytree(checkpoints.path("qwen2_5_vl"), tmp_path / "copy"))
    weights = {name: weight.clone() for name, weight in load_file(copy / "model.safetensors").items()}
    config = json.loads((copy / "config.json").read_text())
    damage(weights, config)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match=message) as caught:
        inspect((str(copy), None, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma3_text"}, "gives no image, video or audio features"),
        ({"model_type": "internvl_chat", "auto_map": {}}, "never run, use its conversion"),
        ({"model_type": "llava", "vision_config": {"model_type": "nothing"}}, "config.json is not valid"),
        ({}, "names no model_type"),
    ],
)
def test_a_configuration_without_an_encoder_is_one_line(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(StartupError, match=message) as caught:
        inspect((str(tmp_path), None, 1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_modules_to_preload_exist(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    modules = preload_modules(str(tmp_path), None)
    assert modules
    assert all(find_spec(module) for module in modules)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "nothing"}', '{"model_type": []}'])
def test_nothing_is_preloaded_for_a_checkpoint_that_cannot_be_used(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert preload_modules(str(tmp_path), None) == []


def test_modules_to_preload_come_from_the_hub_cache_without_the_network(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--someone--something"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text(commit)
    (folder / "snapshots").mkdir()
    (folder / "snapshots" / commit).symlink_to(checkpoints.path("qwen2_5_vl"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    modules = preload_modules("someone/something", None)
    assert modules == preload_modules(str(checkpoints.path("qwen2_5_vl")), None)
    assert preload_modules("someone/something", commit) == modules
    assert preload_modules("someone/something", "another") == []
    assert preload_modules("someone/else", None) == []
    assert preload_modules("not a model", None) == []


def test_the_front_learns_what_to_preload_without_torch_or_a_decoder(tmp_path: Path) -> None:
    code = f"""
import sys
from encode_server.models.inspect import preload_modules
assert preload_modules("demo", None)
preload_modules({str(tmp_path)!r}, None)
preload_modules("someone/something", None)
assert not {{"torch", "transformers", "PIL", "av"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_demo_is_what_it_says_before_it_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = preload_modules("demo", None)
    assert not list(tmp_path.iterdir())
    assert inspect(("demo", None, 1)).preload == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("shape", r"fc1\.weight in model\.safetensors has shape \[8, 8\], expected \[96, 64\]"),
        ("missing", r"lacks 1 encoder tensors: .*fc1\.weight"),
        ("short", r"model\.safetensors is cut short: .* ends at byte \d+"),
        ("processor", "its processor cannot be loaded"),
    ],
)
def test_a_bad_checkpoint_of_a_family_without_rules_of_its_own_is_one_line(
    tmp_path: Path, damage: str, message: str
) -> None:
    path = write("llava", tmp_path / "llava")
    file = path / "model.safetensors"
    weights = {name: weight.clone() for name, weight in load_file(file).items()}
    name = next(name for name in weights if name.endswith("layers.1.mlp.fc1.weight"))
    if damage == "shape":
        weights[name] = torch.zeros(8, 8)
    if damage == "missing":
        del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-100])
    if damage == "processor":
        (path / "processor_config.json").unlink()
    with pytest.raises(StartupError, match=message) as caught:
        inspect((str(path), None, 1))
    assert "\n" not in str(caught.value)
