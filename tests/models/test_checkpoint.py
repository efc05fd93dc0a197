"""Finding a checkpoint, saying what is wrong with one in a line, and reading nothing but its encoder."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from encode_server.errors import StartupError
from encode_server.models.encoder import load_encoder
from encode_server.models.registry import ARCHITECTURES, Summary, check_tp, summarize
from encode_server.models.resolve import resolve
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints


@pytest.fixture
def copy(checkpoints: Checkpoints, tmp_path: Path) -> Path:
    """A Qwen2.5-VL checkpoint to break."""
    return Path(shutil.copytree(checkpoints.path("qwen2_5_vl"), tmp_path / "copy"))


def _load(path: Path) -> None:
    checkpoint = resolve(str(path))
    load_encoder(str(checkpoint.path), device="cpu", dtype="float32", rank=0, world=1)


def _weights(path: Path) -> dict[str, torch.Tensor]:
    """Copies: what load_file gives is mapped from the file, which the tests write over."""
    return {name: weight.clone() for name, weight in load_file(path / "model.safetensors").items()}


def _edit_config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))


def _drop_weights(path: Path) -> None:
    weights = _weights(path)
    kept = {name: weight for name, weight in weights.items() if "visual.blocks.1.mlp" not in name}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def _language_only(path: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(2, 2)}, path / "model.safetensors")


def _narrow(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 44
    (path / "config.json").write_text(json.dumps(config))


def _cut_short(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (lambda path: (path / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda path: (path / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda path: (path / "model.safetensors").unlink(), r"no \*\.safetensors file"),
        (lambda path: (path / "model.safetensors").write_bytes(b"x" * 100), "is not a readable safetensors file"),
        (
            lambda path: _edit_config(path, model_type="llama"),
            "model_type 'llama' is not supported; .* no image, video",
        ),
        (lambda path: _edit_config(path, vision_config=None), "config.json has no vision_config"),
        (_drop_weights, r"lacks 6 encoder tensors: model\.visual\.blocks\.1\.mlp\.down_proj\.bias"),
        (_language_only, "hold no encoder weights"),
        (_narrow, "does not match its config.json"),
        (_cut_short, r"model\.safetensors is cut short: .* ends at byte \d+, the file at byte \d+"),
        (
            lambda path: (path / "model.safetensors.index.json").write_text(
                '{"weight_map": {"visual.a": "gone.safetensors"}}'
            ),
            "gone.safetensors is named by model.safetensors.index.json but missing",
        ),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line(copy: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(copy)
    with pytest.raises(StartupError, match=message) as caught:
        _load(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/at/all", "no such directory"),
        ("./nowhere", "no such directory"),
        ("not a model", "neither a directory nor a valid hub id"),
        ("someone/something", "neither a directory nor in the local hub cache"),
    ],
)
def test_an_unknown_model_is_one_clear_line(model: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StartupError, match=message) as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


def test_summary_names_heads_and_dtype(checkpoints: Checkpoints) -> None:
    summary = summarize(resolve(str(checkpoints.path("qwen2_5_omni"))))
    assert summary.modalities == set(Modality)
    assert summary.heads == {"vision": 4, "audio": 4}
    assert summary.dtype == "float32"


def test_dtype_is_read_from_the_weights_where_the_configuration_is_silent(copy: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in _weights(copy).items()}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    config.pop("dtype", None)
    config["vision_config"].pop("dtype", None)
    (copy / "config.json").write_text(json.dumps(config))
    assert summarize(resolve(str(copy))).dtype == "bfloat16"


def test_heads_left_out_of_config_json_are_those_of_the_config_class() -> None:
    """Released files leave out what equals the default; the registry must then know the same default."""
    import transformers

    for model_type, architecture in ARCHITECTURES.items():
        config = transformers.AutoConfig.for_model(model_type)
        for tower in architecture.towers.values():
            part = config
            for key in tower.path:
                part = getattr(part, key)
            assert getattr(part, tower.heads) == tower.default_heads, model_type


def test_tp_must_divide_every_towers_heads() -> None:
    summary = Summary(frozenset(), {"vision": 16, "audio": 20}, "float32")
    check_tp(summary, 4)
    with pytest.raises(StartupError, match="tp 8 does not divide the 20 attention heads of the audio tower"):
        check_tp(summary, 8)
    with pytest.raises(StartupError, match="tp must be at least 1, got 0"):
        check_tp(summary, 0)


def test_nothing_of_the_language_model_is_read(copy: Path) -> None:
    """Its weights are said to hold 2 GB, in a file of holes: reading them would show in the memory taken."""
    weights = _weights(copy)
    encoder = {name: weight for name, weight in weights.items() if "visual" in name}
    assert 0 < len(encoder) < len(weights)
    _write_sparse(copy / "model.safetensors", encoder, {"model.language_model.embed_tokens.weight": 2 << 30})
    assert (copy / "model.safetensors").stat().st_size > 2 << 30
    code = f"""
import re
from encode_server.models.encoder import load_encoder
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl
def most():  # not ru_maxrss, which begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = most()
info = load_encoder({str(copy)!r}, device="cpu", dtype="float32", rank=0, world=1).info
print(info.weight_bytes, (most() - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    weight_bytes, grown = map(int, done.stdout.split())
    assert weight_bytes < 2 * sum(weight.nbytes for weight in encoder.values())
    assert grown < 100 << 20


def _write_sparse(file: Path, tensors: dict[str, torch.Tensor], holes: dict[str, int]) -> None:
    """A safetensors file whose `holes` (name → bytes, as float32) take no room on the disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    for name, size in holes.items():
        header[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            stream.write(tensor.contiguous().numpy().tobytes())
        stream.truncate(8 + len(text) + offset)


def test_old_names_of_the_vision_tower_load_alike(checkpoints: Checkpoints, copy: Path) -> None:
    """Released Qwen2.5-VL files call it `visual.`, not `model.visual.`."""
    weights = _weights(copy)
    names = {name: name.removeprefix("model.") if "visual" in name else name for name in weights}
    renamed = {names[name]: weight for name, weight in weights.items()}
    renamed = {name.replace("model.visual", "visual"): weight for name, weight in renamed.items()}
    assert any(name.startswith("visual.") for name in renamed)
    save_file(renamed, copy / "model.safetensors", metadata={"format": "pt"})
    _assert_same_weights(copy, checkpoints.path("qwen2_5_vl"))


def _split(path: Path) -> None:
    """Three shards with an index: two that the encoder needs, one of the language model alone."""
    weights = _weights(path)
    (path / "model.safetensors").unlink()
    encoder = [name for name in weights if "visual" in name]
    shards = {"a.safetensors": encoder[::2], "b.safetensors": encoder[1::2]}
    shards["language.safetensors"] = [name for name in weights if name not in encoder]
    for name, keys in shards.items():
        save_file({key: weights[key] for key in keys}, path / name, metadata={"format": "pt"})
    index = {"weight_map": {key: name for name, keys in shards.items() for key in keys}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def test_only_the_shards_that_hold_the_encoder_are_needed(checkpoints: Checkpoints, copy: Path) -> None:
    _split(copy)
    (copy / "language.safetensors").unlink()
    save_file({"model.visual.merger.ln_q.weight": torch.zeros(3)}, copy / "stray.safetensors")
    _assert_same_weights(copy, checkpoints.path("qwen2_5_vl"))


def test_a_hub_checkpoint_is_found_in_the_cache_and_only_its_encoder_asked_for(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    _split(copy)
    (copy / "language.safetensors").unlink()
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--something"
    shutil.copytree(copy, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    asked: list[str] = []
    real = huggingface_hub.snapshot_download

    def snapshot_download(model: str, *, revision: str | None, allow_patterns: list[str], **more: bool) -> str:
        asked.extend(allow_patterns)
        found = real(model, revision=revision, allow_patterns=allow_patterns, cache_dir=tmp_path / "hub", **more)
        return str(found)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    checkpoint = resolve("someone/something", "main")
    assert (checkpoint.name, checkpoint.revision) == ("someone/something", commit)
    assert checkpoint.config["model_type"] == "qwen2_5_vl"
    assert {pattern for pattern in asked if "safetensors" in pattern} == {"a.safetensors", "b.safetensors"}


def _assert_same_weights(path: Path, other: Path) -> None:
    item = {"pixel_values": torch.randn(16, 1176), "grid_thw": torch.tensor([1, 4, 4])}
    [got], [want] = (
        load_encoder(str(directory), device="cpu", dtype="float32", rank=0, world=1).forward(Modality.IMAGE, [item])
        for directory in (path, other)
    )
    torch.testing.assert_close(got, want)


def test_the_light_half_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; import encode_server.models.checkpoint, encode_server.models.registry, encode_server.models.demo"
    )
    code += "; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
