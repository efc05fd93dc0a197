"""What a decode will take is known before it begins, and is not much more than it does take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encode_server.errors import BadMedia, BadRequest, TooLarge
from encode_server.media import samples
from encode_server.media.audio import audio_bytes
from encode_server.media.image import image_bytes
from encode_server.media.limits import MediaLimits
from encode_server.media.video import VideoInfo, video_bytes
from encode_server.wire.modality import Modality

from .decoding import memory_apart
from .samples import container_sound_bytes, picture, sound_bytes, tone
from .samples import image_bytes as image_file
from .samples import video_bytes as video_file

LIMITS = MediaLimits(slow_formats=True)
SLACK = 6 << 20  # bytes that an allocator keeps
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6

IMAGES: dict[str, tuple[str, str, dict[str, object]]] = {
    "JPEG": ("JPEG", "RGB", {}),
    "JPEG, turned": ("JPEG", "RGB", {"exif": SIDEWAYS}),
    "JPEG, progressive": ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    "JPEG, progressive CMYK": ("JPEG", "CMYK", {"progressive": True, "subsampling": 0}),
    "PNG": ("PNG", "RGB", {"compress_level": 1}),
    "PNG with alpha, turned": ("PNG", "RGBA", {"compress_level": 1, "exif": SIDEWAYS}),
    "PNG, grey": ("PNG", "L", {"compress_level": 1}),
    "TIFF of floats": ("TIFF", "F", {}),
    "WEBP": ("WEBP", "RGBA", {"method": 0}),
    "AVIF": ("AVIF", "RGBA", {"speed": 10}),
    "BMP": ("BMP", "RGB", {}),
}


def image(name: str, side: int) -> bytes:
    format, mode, options = IMAGES[name]
    return image_file(format, picture(side, side).convert(mode), **options)


def every(info: VideoInfo) -> range:
    """All frames of a video."""
    return range(info.total_num_frames)


def decoded_bytes(modality: Modality, data: bytes, limits: MediaLimits) -> int:
    """Of an image; of a video of which all frames are chosen; of audio at 16 kHz."""
    if modality is Modality.AUDIO:
        return audio_bytes(data, 16_000, limits)
    return image_bytes(data, limits) if modality is Modality.IMAGE else video_bytes(data, every, limits)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_takes_no_more_than_its_header_says(name: str, tmp_path: Path) -> None:
    large = image(name, 1_600)
    bound = decoded_bytes(Modality.IMAGE, large, LIMITS)
    took = memory_apart("image", image(name, 16), large, tmp_path)
    assert took <= bound + SLACK
    assert took > bound / 4


def test_an_image_that_needs_no_conversion_is_held_once(tmp_path: Path) -> None:
    flat = image_file("BMP", Image.new("RGB", (4_000, 4_000)))
    assert memory_apart("image", image_file("BMP"), flat, tmp_path) < 4 * 4_000 * 4_000 + SLACK


def test_a_video_takes_no_more_than_its_header_says(tmp_path: Path) -> None:
    large = video_file(frames=40, size=(640, 480))
    bound = decoded_bytes(Modality.VIDEO, large, LIMITS)
    assert bound >= 40 * 640 * 480 * 3
    assert 40 * 640 * 480 * 3 / 2 < memory_apart("video", video_file(frames=2), large, tmp_path) <= bound + SLACK


def test_a_video_is_bounded_by_what_the_processor_chooses_and_by_the_limit() -> None:
    data, pixels = samples.clip(), samples.CLIP_SIZE[0] * samples.CLIP_SIZE[1]
    sizes = [video_bytes(data, lambda info: range(frames), LIMITS) for frames in (4, 8, 24)]  # noqa: B023
    assert sizes[1] - sizes[0] == 4 * 3 * pixels
    assert sizes[2] - sizes[1] == 16 * 3 * pixels
    assert sizes[2] == video_bytes(data, every, LIMITS), "the header counts 24 frames"
    # Matroska does not.
    untold = decoded_bytes(Modality.VIDEO, video_file("matroska"), MediaLimits(max_decoded_bytes=1 << 24))
    assert untold == (1 << 24) + 32 * 64 * 48
    assert video_bytes(video_file("matroska"), lambda info: range(6), LIMITS) == (6 * 3 + 32) * 64 * 48


def test_a_header_from_which_nothing_can_be_chosen_counts_with_all_its_frames() -> None:
    def refuse(info: VideoInfo) -> range:
        raise BadRequest("no frames can be chosen")

    data = samples.clip()
    assert video_bytes(data, refuse, LIMITS) == video_bytes(data, every, LIMITS)


def test_audio_takes_no_more_than_its_length_says(tmp_path: Path) -> None:
    minutes = np.tile(tone(1, 44_100, 2), (240, 1))
    large = sound_bytes("FLAC", "PCM_16", minutes)
    bound = decoded_bytes(Modality.AUDIO, large, LIMITS)
    assert bound == pytest.approx(2 * 4 * 240 * 16_000, rel=0.02)
    assert memory_apart("audio", sound_bytes("FLAC"), large, tmp_path) <= bound + SLACK


def test_audio_of_unknown_length_counts_as_long_as_it_may_be() -> None:
    clear = audio_bytes(container_sound_bytes("mp4", "aac"), 8_000, LIMITS)
    assert clear == pytest.approx(2 * 4 * 0.52 * 8_000 + 4 * 65_536, rel=0.02)
    untold = decoded_bytes(Modality.AUDIO, container_sound_bytes("matroska", "aac"), MediaLimits(max_audio_seconds=100))
    assert untold >= 2 * 4 * 100 * 16_000


@pytest.mark.parametrize("modality", list(Modality))
def test_what_the_header_shows_is_refused_at_this_point(modality: Modality) -> None:
    with pytest.raises(BadMedia):
        decoded_bytes(modality, bytes(100), LIMITS)
    with pytest.raises(TooLarge):
        decoded_bytes(modality, samples.probe_media(modality), MediaLimits(max_bytes=10))


def test_an_image_of_too_many_pixels_is_refused_by_its_header() -> None:
    with pytest.raises(TooLarge, match="40 x 30"):
        decoded_bytes(Modality.IMAGE, image_file("PNG"), MediaLimits(max_pixels=100))
