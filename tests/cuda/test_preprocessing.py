"""`--preproc-device`: what comes back from an emulated device, when, and what stays on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.card.device import emulated
from benchmarks.card.ledger import Kind, Launch
from encode_server.media.limits import MediaLimits
from encode_server.models import on_device
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import resolve
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints
from tests.cuda.ward import MEDIA
from tests.models import samples
from tests.models.families.builders import write

STEP = {torch.uint8: 1.0, torch.float32: 1 / 255 / 0.26}
"""One of 255 steps of a value, as tensors of that dtype have it; 0.26 is the least deviation of the processors here.
The root of the mean square of the differences has to be below that: a CPU rounds and clips bytes between the two
directions of a resize, a GPU does not. The items are noise, the worst case."""
VIDEO = Modality.VIDEO
IMAGE = Modality.IMAGE


def preprocessor(path: Path, **more: Any) -> Preprocessor:
    return Preprocessor(resolve(str(path)), MediaLimits(), **more)


def assert_close(preparing: Preprocessor, on_cpu: Preprocessor, modality: Modality, data: bytes) -> None:
    options = ItemOptions(max_pixels=56 * 56) if on_cpu._family.sizes_freely(on_cpu._processors[modality]) else None
    for given in (None, options):
        got, want = preparing.prepare(modality, data, given), on_cpu.prepare(modality, data, given)
        assert (got.grid_thw, got.tokens, got.cost, got.extra) == (want.grid_thw, want.tokens, want.cost, want.extra)
        assert list(got.tensors) == list(want.tensors)
        for name, tensor in want.tensors.items():
            assert type(got.tensors[name]) is torch.Tensor and got.tensors[name].dtype is tensor.dtype
            off = got.tensors[name].double() - tensor.double()
            assert off.square().mean().sqrt() < STEP.get(tensor.dtype, 1e-9), name


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("siglip", IMAGE),
        ("qwen2_5_vl", IMAGE),
        *(
            pytest.param(name, modality, marks=pytest.mark.slow)
            for name in ("qwen2_5_vl", "qwen3_vl", "qwen2_5_omni_thinker")
            for modality in (VIDEO, IMAGE)
            if (name, modality) != ("qwen2_5_vl", IMAGE)
        ),
        *(pytest.param(name, IMAGE, marks=pytest.mark.slow) for name in ("clip", "dinov2")),
    ],
)
def test_the_device_gives_what_the_cpu_gives_and_nothing_is_queued_when_it_is_copied_on(
    checkpoints: Checkpoints, name: str, modality: Modality
) -> None:
    path = checkpoints.path(name)
    on_cpu = preprocessor(path)
    warnings: list[str] = []
    with emulated() as device:
        preparing = preprocessor(path, device="cuda:0", warn=warnings.append)
        for data in MEDIA[modality]:
            device.ledger.clear()
            preparing.prepare(modality, data)
            assert device.streams.pending == 0
            assert [one for one in device.ledger.of(Kind.KERNEL) if "upsample" in one.name]
            assert_close(preparing, on_cpu, modality, data)
    assert [warning for warning in warnings if "audio" not in warning] == []


@pytest.mark.slow
def test_a_family_without_rules_of_its_own(tmp_path: Path) -> None:
    path = write("llava", tmp_path / "llava")
    warnings: list[str] = []
    with emulated() as device:
        preparing = preprocessor(path, device="cuda:0", warn=warnings.append)
        assert_close(preparing, preprocessor(path), IMAGE, samples.png(90, 70))
        assert device.streams.pending == 0 and device.ledger.of(Kind.TO_HOST)
    assert warnings == []


def test_the_allocator_has_its_addresses_before_they_are_limited(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preparer limits its addresses as soon as its preprocessor is made, whose trial has small items alone."""
    sizes = list[int]()

    def empty(*size: int, real: Any = torch.empty, **options: Any) -> torch.Tensor:
        if options.get("device") == "cuda:0":
            sizes.extend(size)
            raise torch.OutOfMemoryError("not even that")
        return real(*size, **options)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "empty", empty)
    with emulated():
        preprocessor(checkpoints.path("siglip"), device="cuda:0")
    assert sizes == [on_device.LARGE]


def test_audio_keeps_the_cpu_and_is_named(checkpoints: Checkpoints) -> None:
    warnings: list[str] = []
    with emulated() as device:
        preparing = preprocessor(checkpoints.path("qwen2_audio"), device="cuda:0", warn=warnings.append)
        preparing.prepare(Modality.AUDIO, MEDIA[Modality.AUDIO][0])
        assert device.ledger.launches == []
    assert warnings == [
        "--preproc-device cuda:0: audio is preprocessed on the CPU: WhisperFeatureExtractor takes no device"
    ]


def test_lanczos_keeps_the_cpu_because_a_gpu_would_take_bicubic_interpolation(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, warnings = checkpoints.path("siglip"), list[str]()
    real = Preprocessor._move

    def move(self: Preprocessor, modalities: Any) -> None:
        self._processors[IMAGE].resample = on_device.LANCZOS
        real(self, modalities)

    monkeypatch.setattr(Preprocessor, "_move", move)
    with emulated() as device:
        preprocessor(path, device="cuda:0", warn=warnings.append).prepare(IMAGE, MEDIA[IMAGE][0])
        assert device.ledger.launches == []
    assert len(warnings) == 1 and "Lanczos" in warnings[0]


def test_a_processor_that_gives_something_else_there_keeps_the_cpu(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoints.path("siglip")
    want = preprocessor(path).prepare(IMAGE, MEDIA[IMAGE][0]).tensors["pixel_values"]
    real, warnings = on_device.to_host, list[str]()

    def mirrored(prepared: Any) -> Any:
        found = real(prepared)
        found.tensors["pixel_values"] = -found.tensors["pixel_values"]
        return found

    monkeypatch.setattr(on_device, "to_host", mirrored)
    with emulated():
        preparing = preprocessor(path, device="cuda:0", warn=warnings.append)
        got = preparing.prepare(IMAGE, MEDIA[IMAGE][0]).tensors["pixel_values"]
    assert torch.equal(got, want)
    assert warnings == ["--preproc-device cuda:0: image is preprocessed on the CPU: its pixel_values are others there"]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), False),
        (torch.AcceleratorError("CUDA error: out of memory"), False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), False),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
    ],
    ids=lambda value: str(value).lower().replace(" ", "-"),
)
def test_a_device_without_memory_costs_one_item_the_device_and_a_broken_one_all(
    checkpoints: Checkpoints, error: Exception, lost: bool
) -> None:
    path = checkpoints.path("siglip")
    want = preprocessor(path).prepare(IMAGE, MEDIA[IMAGE][0]).tensors["pixel_values"]
    warnings: list[str] = []

    def fail(launch: Launch) -> None:
        raise error

    with emulated() as device:
        preparing = preprocessor(path, device="cuda:0", warn=warnings.append)
        assert warnings == []
        device.on_launch = fail
        assert torch.equal(preparing.prepare(IMAGE, MEDIA[IMAGE][0]).tensors["pixel_values"], want)
        device.on_launch = lambda launch: None
        device.ledger.clear()
        preparing.prepare(IMAGE, MEDIA[IMAGE][0])
        assert bool(device.ledger.launches) is not lost
    assert len(warnings) == lost
