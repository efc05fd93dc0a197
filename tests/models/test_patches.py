"""Patches cut in two passes are those of the checkpoint's own processor, or the processor is asked itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoVideoProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from encode_server.media.limits import MediaLimits
from encode_server.models.patches import ImagePatches, VideoPatches
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import resolve
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints
from tests.models import samples

RAW = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
SIZES = [(1, 1), (1, 199), (27, 29), (28, 28), (56, 84), (64, 96), (97, 333), (640, 11), (250, 250), (448, 672)]
"""Height, width: smaller than a patch, odd, kept as they are with a factor of 28 or 32, extreme in their ratio."""
BOUNDS = [(28 * 28, 28 * 28 * 1280), (300 * 300, 1000 * 1000), (56 * 56, 100 * 100), (224 * 224, 224 * 224)]


class Subclass(Qwen2VLImageProcessor):
    """What a checkpoint's own code may be: it may do anything."""


class VideoSubclass(Qwen2VLVideoProcessor):
    """The same for video."""


def _one_frame(patches: torch.Tensor, processor: Any) -> torch.Tensor:
    """Without the repetition of a still image's frame."""
    frames = patches.view(len(patches), 3, processor.temporal_patch_size, -1)
    assert torch.equal(frames, frames[:, :, :1].expand_as(frames))
    return frames[:, :, 0].reshape(len(patches), -1)


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"patch_size": 16}, {"merge_size": 1}, {"merge_size": 3, "temporal_patch_size": 1}, {"resample": 2}],
    ids=str,
)
def test_images(settings: dict[str, Any], bounds: tuple[int, int]) -> None:
    processor = Qwen2VLImageProcessor(**settings)
    quick = ImagePatches.of(processor)
    assert quick is not None
    options = {"size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]}}
    for size in SIZES:
        image = Image.fromarray(samples.pixels(*size))
        patches, grid = quick(image, options)
        want = processor([image], **RAW, **options)
        assert patches.dtype is torch.uint8
        assert patches.is_contiguous()
        assert torch.equal(patches, _one_frame(want["pixel_values"], processor)), size
        assert [list(grid)] == want["image_grid_thw"].tolist()


def test_images_of_the_processors_own_size() -> None:
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 120 * 120, "longest_edge": 130 * 130})
    quick = ImagePatches.of(processor)
    assert quick is not None
    image = Image.fromarray(samples.pixels(300, 500))
    patches, _ = quick(image, {})
    assert torch.equal(patches, _one_frame(processor([image], **RAW)["pixel_values"], processor))


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize(
    "processor",
    [
        Qwen2VLVideoProcessor(cap_pixels_per_frame=False),
        Qwen2VLVideoProcessor(cap_pixels_per_frame=True, max_video_tokens=100),
        Qwen2VLVideoProcessor(),
        Qwen2VLVideoProcessor(patch_size=8, merge_size=1, temporal_patch_size=3),
        Qwen3VLVideoProcessor(cap_pixels_per_frame=False),
        Qwen3VLVideoProcessor(cap_pixels_per_frame=True, max_video_tokens=40),
    ],
    ids=lambda value: f"{type(value).__name__}-{value.cap_pixels_per_frame}-{value.patch_size}",
)
def test_clips(processor: Any, count: int) -> None:
    quick = VideoPatches.of(processor)
    assert quick is not None
    for size in [(28, 84), (64, 96), (97, 333), (250, 250)]:
        frames = np.stack([samples.pixels(*size, seed) for seed in range(count)])
        for bounds in BOUNDS:
            options = {"size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]}}
            patches, grid = quick(frames, options)
            want = _clip(processor, frames, **options)
            assert torch.equal(patches, want["pixel_values_videos"]), (size, bounds)
            assert [list(grid)] == want["video_grid_thw"].tolist()


def _clip(processor: Any, frames: npt.NDArray[np.uint8], **options: Any) -> Any:
    return processor([frames], do_sample_frames=False, input_data_format="channels_last", **RAW, **options)


def test_a_shape_that_the_processor_refuses_is_refused_with_the_same_words() -> None:
    processor = Qwen2VLImageProcessor()
    quick = ImagePatches.of(processor)
    assert quick is not None
    image = Image.new("RGB", (300, 1))
    with pytest.raises(ValueError, match="absolute aspect ratio") as caught:
        quick(image, {})
    with pytest.raises(ValueError) as own:
        processor([image], **RAW)
    assert str(caught.value) == str(own.value)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni_thinker"])
def test_the_processors_of_every_qwen_checkpoint_are_known(checkpoints: Checkpoints, name: str) -> None:
    path = checkpoints.path(name)
    assert ImagePatches.of(AutoImageProcessor.from_pretrained(path)) is not None
    assert VideoPatches.of(AutoVideoProcessor.from_pretrained(path)) is not None


@pytest.mark.parametrize(
    "processor",
    [
        Subclass(),
        Qwen2VLImageProcessor(do_resize=False),
        Qwen2VLImageProcessor(do_rescale=False),
        Qwen2VLImageProcessor(do_normalize=False),
        Qwen2VLImageProcessor(do_pad=True),
    ],
)
def test_other_image_processors_are_asked_themselves(processor: Any) -> None:
    assert ImagePatches.of(processor) is None


@pytest.mark.parametrize(
    "processor", [VideoSubclass(), Qwen2VLVideoProcessor(do_resize=False), Qwen3VLVideoProcessor(do_normalize=False)]
)
def test_other_video_processors_are_asked_themselves(processor: Any) -> None:
    assert VideoPatches.of(processor) is None


@pytest.mark.parametrize(
    ("patches", "processor"), [(ImagePatches, Qwen2VLImageProcessor), (VideoPatches, Qwen2VLVideoProcessor)]
)
def test_a_release_that_orders_patches_differently_is_noticed(
    monkeypatch: pytest.MonkeyPatch, patches: Any, processor: Any
) -> None:
    original = processor.patchify

    def reversed_order(*args: Any, **more: Any) -> Any:
        flat, *grid = original(*args, **more)
        return flat.flip(1), *grid

    monkeypatch.setattr(processor, "patchify", reversed_order)
    assert patches.of(processor()) is None


@pytest.mark.parametrize(("modality", "data"), [(Modality.IMAGE, samples.png(97, 333)), (Modality.VIDEO, None)])
def test_a_processor_that_is_not_known_gives_the_same_the_longer_way(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, modality: Modality, data: bytes | None
) -> None:
    data = data or samples.clip(5, 40, 60)
    checkpoint = resolve(str(checkpoints.path("qwen2_5_vl")))
    quick = Preprocessor(checkpoint, MediaLimits()).prepare(modality, data)
    for patches in (ImagePatches, VideoPatches):
        monkeypatch.setattr(patches, "of", lambda _processor: None)
    slow = Preprocessor(checkpoint, MediaLimits()).prepare(modality, data)
    assert quick.tensors.keys() == slow.tensors.keys()
    assert all(torch.equal(quick.tensors[name], slow.tensors[name]) for name in slow.tensors)
    assert (quick.tokens, quick.cost, quick.pairs, quick.grid_thw) == (
        slow.tokens,
        slow.cost,
        slow.pairs,
        slow.grid_thw,
    )
    assert quick.extra == slow.extra
