"""What the front sends to the ranks is what the checkpoint's own processors make, and options apply per call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from encode_server.errors import BadMedia, BadRequest, EncodeError, StartupError, TooLarge, UnsupportedModality
from encode_server.media.limits import MediaLimits
from encode_server.models.families.qwen_vl import patch_timestamps
from encode_server.models.pixels import unpack
from encode_server.models.prepared import Prepared
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import resolve
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints
from tests.models import samples
from tests.models.reference import audio_inputs, image_inputs, video_inputs

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni_thinker"]


def _preprocessor(checkpoints: Checkpoints, name: str) -> Preprocessor:
    return Preprocessor(resolve(str(checkpoints.path(name))), MediaLimits())


def _as_the_tower_takes_it(prepared: Prepared, checkpoints: Checkpoints, name: str) -> torch.Tensor:
    """What a rank makes of the bytes it is sent."""
    assert prepared.tensors["pixel_values"].dtype is torch.uint8
    patch = 16 if name == "qwen3_vl" else 14
    config = SimpleNamespace(patch_size=patch, temporal_patch_size=2)
    return unpack([prepared.tensors], config, torch.device("cpu"), torch.float32)


def _assert_video(prepared: Prepared, inputs: dict[str, torch.Tensor], checkpoints: Checkpoints, name: str) -> None:
    assert torch.equal(_as_the_tower_takes_it(prepared, checkpoints, name), inputs["pixel_values_videos"])
    assert prepared.grid_thw == tuple(inputs["video_grid_thw"][0].tolist())


@pytest.mark.parametrize("name", QWEN)
def test_qwen_pictures(checkpoints: Checkpoints, name: str) -> None:
    prepared = _preprocessor(checkpoints, name).prepare(Modality.IMAGE, samples.png(150, 333))
    inputs = image_inputs(checkpoints.path(name), samples.pixels(150, 333))
    assert torch.equal(_as_the_tower_takes_it(prepared, checkpoints, name), inputs["pixel_values"])
    assert prepared.tensors["pixel_values"].numel() * 2 == inputs["pixel_values"].numel()  # no repeated frame
    t, h, w = inputs["image_grid_thw"][0].tolist()
    assert prepared.grid_thw == (t, h, w)
    assert (prepared.tokens, prepared.cost) == (t * h * w // 4, t * h * w)


@pytest.mark.parametrize("name", ["siglip", "clip", "dinov2"])
def test_pictures_of_one_size(checkpoints: Checkpoints, name: str) -> None:
    prepared = _preprocessor(checkpoints, name).prepare(Modality.IMAGE, samples.png(70, 123))
    inputs = image_inputs(checkpoints.path(name), samples.pixels(70, 123))
    assert torch.equal(prepared.tensors["pixel_values"], inputs["pixel_values"][0])
    assert prepared.grid_thw is None


@pytest.mark.parametrize("name", QWEN)
def test_clips(checkpoints: Checkpoints, name: str) -> None:
    """40 frames at 10 per second: those that sample take 2 per second, the others all."""
    clip = samples.clip(40, 40, 60)
    prepared = _preprocessor(checkpoints, name).prepare(Modality.VIDEO, clip)
    inputs = video_inputs(checkpoints.path(name), clip)
    _assert_video(prepared, inputs, checkpoints, name)
    sampled = name in ("qwen3_vl", "qwen2_5_omni_thinker")
    assert prepared.grid_thw is not None
    assert prepared.grid_thw[0] == (4 if sampled else 20)


def test_timing_goes_with_a_clip(checkpoints: Checkpoints) -> None:
    clip = samples.clip(40, 40, 60)
    prepared = {name: _preprocessor(checkpoints, name).prepare(Modality.VIDEO, clip).extra for name in QWEN}
    # every frame at 10 per second, two to a patch
    assert prepared["qwen2_5_vl"] == {"second_per_grid_ts": pytest.approx(0.2)}
    assert prepared["qwen2_5_omni_thinker"] == {"second_per_grid_ts": pytest.approx(1.0)}
    assert prepared["qwen2_vl"] == {}
    # frames 0, 6, 11, 17, 22, 28, 33, 39 of 40: linspace(0, 39, 8), rounded
    assert prepared["qwen3_vl"] == {"video_timestamps": pytest.approx([0.3, 1.4, 2.5, 3.6])}


def test_timestamps_are_those_of_the_language_sides_prompt() -> None:
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    for indices in ([0, 5, 9, 14], [0, 3, 6], [7]):
        want = Qwen3VLProcessor._calculate_timestamps(None, list(indices), 7.5, 2)  # type: ignore[arg-type]
        assert patch_timestamps(indices, 7.5, 2) == want


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("frames", [1, 3])
def test_clips_of_a_few_frames(checkpoints: Checkpoints, name: str, frames: int) -> None:
    prepared = _preprocessor(checkpoints, name).prepare(Modality.VIDEO, samples.clip(frames, 70, 70))
    assert prepared.grid_thw is not None
    assert prepared.grid_thw[0] in (1, 2)
    assert prepared.tensors["pixel_values"].shape[0] == prepared.cost


@pytest.mark.parametrize("seconds", [0.06, 0.9, 3.996, 12.0])
def test_sounds_for_omni_are_the_frames_its_mask_keeps(checkpoints: Checkpoints, seconds: float) -> None:
    prepared = _preprocessor(checkpoints, "qwen2_5_omni_thinker").prepare(Modality.AUDIO, samples.wav(seconds))
    inputs = audio_inputs(checkpoints.path("qwen2_5_omni_thinker"), samples.samples(seconds))
    frames = int(inputs["attention_mask"].sum())
    _same_sound(prepared.tensors["input_features"], inputs["input_features"][0, :, :frames])
    assert prepared.cost == prepared.extra["mel_frames"] == frames


@pytest.mark.parametrize("seconds", [0.06, 1.23, 3.97, 3.99, 12.0])
def test_sounds_for_qwen2_audio_are_without_the_padding(checkpoints: Checkpoints, seconds: float) -> None:
    prepared = _preprocessor(checkpoints, "qwen2_audio").prepare(Modality.AUDIO, samples.wav(seconds))
    inputs = audio_inputs(checkpoints.path("qwen2_audio"), samples.samples(seconds))
    frames = int(inputs["attention_mask"].sum())
    _same_sound(prepared.tensors["input_features"], inputs["input_features"][0, :, : frames + 2])
    assert prepared.cost == prepared.extra["mel_frames"] == frames


def test_sounds_for_whisper_are_padded_to_its_window(checkpoints: Checkpoints) -> None:
    prepared = _preprocessor(checkpoints, "whisper").prepare(Modality.AUDIO, samples.wav(1.23))
    inputs = audio_inputs(checkpoints.path("whisper"), samples.samples(1.23))
    assert torch.equal(prepared.tensors["input_features"], inputs["input_features"][0])
    assert prepared.extra["mel_frames"] == int(inputs["attention_mask"].sum()) == 123
    assert prepared.cost == 400


def test_a_sound_too_short_for_a_token_is_followed_by_silence(checkpoints: Checkpoints) -> None:
    for name in ("qwen2_5_omni_thinker", "qwen2_audio"):
        prepared = _preprocessor(checkpoints, name).prepare(Modality.AUDIO, samples.wav(0.01))
        assert (prepared.tokens, prepared.extra["mel_frames"]) == (1, 3)


def _same_sound(found: torch.Tensor, expected: torch.Tensor) -> None:
    # Not to the bit: a product of another length may be summed up in another order.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", QWEN)
def test_pixel_bounds_apply_to_one_call(checkpoints: Checkpoints, name: str) -> None:
    preprocessor = _preprocessor(checkpoints, name)
    picture = samples.png(300, 300)
    plain = preprocessor.prepare(Modality.IMAGE, picture)
    for low, high in ((None, 120 * 120), (500 * 500, None), (90 * 90, 100 * 100)):
        sized = preprocessor.prepare(Modality.IMAGE, picture, ItemOptions(min_pixels=low, max_pixels=high))
        size = {"shortest_edge": low or 56 * 56, "longest_edge": high or 500 * 500}
        inputs = image_inputs(checkpoints.path(name), samples.pixels(300, 300), size=size)
        assert torch.equal(_as_the_tower_takes_it(sized, checkpoints, name), inputs["pixel_values"])
        assert sized.grid_thw != plain.grid_thw
    assert preprocessor.prepare(Modality.IMAGE, picture).grid_thw == plain.grid_thw


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize(
    ("options", "frames"),
    [
        (ItemOptions(fps=5), 20),
        (ItemOptions(num_frames=6), 6),
        (ItemOptions(fps=5, max_frames=8), 8),
        (ItemOptions(fps=0.5, min_frames=10), 10),
        (ItemOptions(max_frames=4), 4),
    ],
)
def test_frame_options_apply_to_one_call(
    checkpoints: Checkpoints, name: str, options: ItemOptions, frames: int
) -> None:
    preprocessor = _preprocessor(checkpoints, name)
    clip = samples.clip(40, 40, 60)
    plain = preprocessor.prepare(Modality.VIDEO, clip)
    chosen = preprocessor.prepare(Modality.VIDEO, clip, options)
    assert chosen.grid_thw is not None
    assert chosen.grid_thw[0] == frames // 2
    if options.max_frames is options.min_frames is None:
        given = {"fps": options.fps} if options.fps else {"fps": None, "num_frames": options.num_frames}
        _assert_video(
            chosen, video_inputs(checkpoints.path(name), clip, do_sample_frames=True, **given), checkpoints, name
        )
    assert preprocessor.prepare(Modality.VIDEO, clip).grid_thw == plain.grid_thw


@pytest.mark.parametrize(
    ("modality", "data", "options", "error", "message"),
    [
        (Modality.IMAGE, b"no picture", ItemOptions(), BadMedia, "image"),
        (Modality.VIDEO, b"no clip", ItemOptions(), BadMedia, "video"),
        (Modality.IMAGE, samples.png(1, 300), ItemOptions(), BadMedia, "aspect ratio"),
        (Modality.IMAGE, samples.png(20, 20), ItemOptions(min_pixels=9, max_pixels=4), BadRequest, "min_pixels 9"),
        (Modality.IMAGE, samples.png(20, 20), ItemOptions(max_pixels=0), BadRequest, "max_pixels must be above 0"),
        (Modality.IMAGE, samples.png(20, 20), ItemOptions(min_pixels=1 << 40), TooLarge, "min_pixels"),
        (Modality.VIDEO, samples.clip(4, 20, 20), ItemOptions(fps=2, num_frames=2), BadRequest, "exclude each other"),
        (Modality.VIDEO, samples.clip(4, 20, 20), ItemOptions(fps=float("nan")), BadRequest, "fps must be above 0"),
        (Modality.VIDEO, samples.clip(4, 20, 20), ItemOptions(num_frames=64), BadRequest, "from 4 with these options"),
        (Modality.AUDIO, samples.wav(0.1), ItemOptions(), UnsupportedModality, "does not encode audio"),
    ],
)
def test_errors_are_the_callers(
    checkpoints: Checkpoints,
    modality: Modality,
    data: bytes,
    options: ItemOptions,
    error: type[EncodeError],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        _preprocessor(checkpoints, "qwen2_5_vl").prepare(modality, data, options)


def test_pixel_bounds_mean_nothing_to_a_tower_of_one_size(checkpoints: Checkpoints) -> None:
    with pytest.raises(BadRequest, match="own processor chooses the size"):
        _preprocessor(checkpoints, "siglip").prepare(Modality.IMAGE, samples.png(9, 9), ItemOptions(max_pixels=99))


def test_a_missing_processor_is_one_clear_line(checkpoints: Checkpoints, tmp_path: object) -> None:
    import shutil
    from pathlib import Path

    copy = Path(shutil.copytree(checkpoints.path("siglip"), Path(str(tmp_path)) / "copy"))
    (copy / "processor_config.json").unlink()
    with pytest.raises(StartupError, match="its image processor cannot be loaded") as caught:
        Preprocessor(resolve(str(copy)), MediaLimits())
    assert "\n" not in str(caught.value)


def test_many_threads_get_what_one_gets(checkpoints: Checkpoints) -> None:
    preprocessor = _preprocessor(checkpoints, "qwen2_5_omni_thinker")
    clip = samples.clip(12, 40, 60)
    work = [
        (Modality.IMAGE, samples.png(100, 90), ItemOptions()),
        (Modality.IMAGE, samples.png(100, 90), ItemOptions(max_pixels=60 * 60)),
        (Modality.VIDEO, clip, ItemOptions()),
        (Modality.VIDEO, clip, ItemOptions(num_frames=6)),
        (Modality.AUDIO, samples.wav(0.7), ItemOptions()),
    ]
    want = [preprocessor.prepare(*item).tensors for item in work]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda index: preprocessor.prepare(*work[index % len(work)]).tensors, range(40)))
    for index, tensors in enumerate(got):
        expected = want[index % len(work)]
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
