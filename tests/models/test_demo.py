"""The embedded demo checkpoint: ordinary, honest about its weights, and safe to write by two processes concurrently."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from encode_server.errors import StartupError
from encode_server.media.limits import MediaLimits
from encode_server.models.demo import demo_path, write_demo
from encode_server.models.encoder import load_encoder
from encode_server.models.preprocess import Preprocessor
from encode_server.models.registry import check_tp, summarize
from encode_server.models.resolve import resolve
from encode_server.wire.modality import Modality


def test_demo_is_written_once_to_the_cache_and_encodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint = resolve("demo")
    assert checkpoint.path.is_relative_to(tmp_path)
    assert checkpoint.name == "demo"
    written = (checkpoint.path / "model.safetensors").stat().st_mtime_ns
    assert (resolve("demo").path / "model.safetensors").stat().st_mtime_ns == written
    assert "random" in (checkpoint.path / "README.md").read_text()
    assert sum(file.stat().st_size for file in checkpoint.path.iterdir()) < 10 << 20
    check_tp(summarize(checkpoint), 8)
    preprocessor = Preprocessor(checkpoint, MediaLimits())
    encoder = load_encoder(str(checkpoint.path), device="cpu", dtype="float32", rank=0, world=1)
    assert preprocessor.modalities == set(Modality)
    for modality in Modality:
        prepared = preprocessor.prepare(modality, preprocessor.probe(modality))
        [embedding] = encoder.forward(modality, [prepared.tensors])
        assert embedding.shape == (prepared.tokens, encoder.info.dims[modality])
        assert embedding.isfinite().all()


def test_transformers_loads_the_demo_like_any_other(tmp_path: Path) -> None:
    from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

    write_demo(tmp_path / "demo")
    processor = AutoProcessor.from_pretrained(tmp_path / "demo")
    model, report = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        tmp_path / "demo", output_loading_info=True, dtype=torch.float32
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = processor(text="see <|IMAGE|>", images=[torch.zeros(3, 60, 60, dtype=torch.uint8)], return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
    assert model(**inputs).logits.isfinite().all()


def test_demo_weights_are_the_same_everywhere(tmp_path: Path) -> None:
    torch.manual_seed(1)
    write_demo(tmp_path / "one")
    torch.manual_seed(2)
    write_demo(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_directory_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(StartupError, match="exists and is not an empty directory"):
        write_demo(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


def test_two_writers_at_once_leave_one_whole_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both are held until each has written its draft, so that both try to rename."""
    import encode_server.models.demo as demo

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    barrier = threading.Barrier(2, timeout=60)

    def write(directory: Path) -> None:
        (directory / "config.json").write_text("{}")
        barrier.wait()

    monkeypatch.setattr(demo, "_write", write)
    found: list[Path] = []
    writers = [threading.Thread(target=lambda: found.append(demo_path())) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(found) == 2
    assert found[0] == found[1]
    assert [file.name for file in found[0].parent.iterdir()] == [found[0].name]
