"""Every number of channels and every layout, in every container: the mean of the channels, and never a crash."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from encode_server.errors import BadMedia
from encode_server.media.layouts import refuse_listed

from . import boxes
from .decoding import decode_apart
from .samples import container_sound_bytes

RATE = 48_000
LAYOUTS = (
    *("mono", "stereo", "2.1", "3.0", "3.0(back)", "4.0", "quad", "quad(side)", "3.1", "5.0", "5.0(side)", "4.1"),
    *("5.1", "5.1(side)", "6.0", "hexagonal", "6.1", "7.0", "7.1", "7.1(wide)", "octagonal", "cube", "5.1.4", "7.1.2"),
    *("7.1.4", "9.1.4", "9.1.6", "hexadecagonal", *[f"{count} channels" for count in range(1, 17)]),
)
LOSSLESS = (
    *[("matroska", codec) for codec in ("flac", "pcm_s16le", "pcm_f32le", "alac")],
    *[("mov", codec) for codec in ("pcm_s16le", "alac")],
    *[("mp4", codec) for codec in ("flac", "alac", "pcm_s16le")],
    *[("ogg", "flac"), ("flac", "flac"), ("wav", "pcm_s16le"), ("w64", "pcm_s16le"), ("aiff", "pcm_s16be")],
    *[("caf", "pcm_s16le"), ("au", "pcm_s16be"), ("avi", "pcm_s16le"), ("asf", "pcm_s16le")],
)
LOSSY = (
    *[("matroska", codec) for codec in ("libopus", "aac", "ac3", "eac3")],
    *[("mov", "aac"), ("mp4", "aac"), ("mp4", "libopus"), ("webm", "libopus"), ("ogg", "libopus")],
    *[("adts", "aac"), ("mpegts", "aac")],
)


def channels(count: int) -> np.ndarray:
    """int16 [4800, count]: every channel a tone of its own."""
    time = np.arange(4800)[:, None] / RATE
    return np.round(8_000 * np.sin(2 * np.pi * 300 * (1 + np.arange(count)) * time)).astype(np.int16)


def files(kinds: tuple[tuple[str, str], ...]) -> dict[str, tuple[bytes, np.ndarray]]:
    """A file for each layout that the encoder and the container take, and its channels."""
    found = {}
    for format, codec in kinds:
        for layout in LAYOUTS:
            samples = channels(av.AudioLayout(layout).nb_channels)
            try:
                data = container_sound_bytes(format, codec, RATE, layout=layout, samples=samples)
            except av.error.FFmpegError:
                continue
            found[f"{format} {codec} {layout}"] = data, samples
    return found


def test_lossless_audio_of_any_layout_is_the_mean_of_its_channels(tmp_path: Path) -> None:
    made = files(LOSSLESS)
    assert {samples.shape[1] for _, samples in made.values()} == set(range(1, 17))
    outcomes = decode_apart({name: data for name, (data, _) in made.items()}, RATE, tmp_path)
    for name, (_, samples) in made.items():
        assert isinstance(outcomes[name], np.ndarray), (name, outcomes[name])
        np.testing.assert_allclose(outcomes[name], samples.mean(1) / 32_768, atol=1e-6, err_msg=name)


def test_lossy_audio_of_any_layout_is_read(tmp_path: Path) -> None:
    made = files(LOSSY)
    assert {samples.shape[1] for _, samples in made.values()} >= set(range(1, 9))
    outcomes = decode_apart({name: data for name, (data, _) in made.items()}, RATE, tmp_path)
    for name, samples in outcomes.items():
        assert isinstance(samples, np.ndarray), (name, samples)
        assert len(samples) >= 1_000, name
        assert 0.01 < np.abs(samples).max() < 1, name


@pytest.mark.parametrize("labels", [(3, 1, 2), (1, 1, 2), (0x10000, 0x10001, 0), (2, 5, 400)], ids=str)
def test_a_mov_that_names_its_channels_in_an_order_of_its_own_is_read(labels: tuple[int, ...], tmp_path: Path) -> None:
    samples = np.tile(channels(3), (10, 1))  # many frames: memory released twice shows later
    data = boxes.pcm_movie(samples.astype("<i2").tobytes(), 3, boxes.layout(*labels))
    outcome = decode_apart({"mov": data}, RATE, tmp_path)["mov"]
    np.testing.assert_allclose(outcome, samples.mean(1) / 32_768, atol=1e-6)


def test_ambisonics_with_a_stereo_pair_are_read(tmp_path: Path) -> None:
    data = bytearray(container_sound_bytes("matroska", "libopus", layout="5.1", samples=channels(6)))
    data[data.index(b"OpusHead") + 18] = 2  # the channel mapping family
    outcome = decode_apart({"opus": bytes(data)}, RATE, tmp_path)["opus"]
    assert isinstance(outcome, np.ndarray), outcome
    assert len(outcome) >= 4_000


def test_a_decoder_that_lists_its_channels_is_refused_before_the_list_is_released_twice() -> None:
    frame = SimpleNamespace(layout=av.AudioLayout("FC+FL+FR"))
    holders = sys.getrefcount(frame.layout)
    try:
        refuse_listed(frame)
    except BadMedia as error:
        assert "standard layout" in error.message
    kept = sys.getrefcount(frame.layout)
    assert kept == holders + 1
    for name in ("5.1", "3 channels", "7.1(wide)", "ambisonic 1"):
        refuse_listed(SimpleNamespace(layout=av.AudioLayout(name)))
