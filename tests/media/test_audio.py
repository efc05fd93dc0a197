import io
import struct
import time

import av
import numpy as np
import pytest
import soundfile
import soxr

from encode_server.errors import BadMedia, TooLarge
from encode_server.media.audio import decode_audio
from encode_server.media.limits import MediaLimits

from .samples import CONTAINER_KINDS, SOUND_KINDS, container_sound_bytes, sound_bytes, tone, video_bytes

LIMITS = MediaLimits()


def plain_samples(data: bytes, rate: int) -> np.ndarray:
    samples, source_rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(1), source_rate, rate, quality="HQ")


def plain_container_samples(data: bytes, rate: int) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(audio=0))
    converter = av.AudioResampler(format="fltp", layout=frames[0].layout, rate=frames[0].sample_rate)
    parts = [part.to_ndarray() for frame in frames for part in converter.resample(frame)]
    return soxr.resample(np.concatenate(parts, 1).mean(0), frames[0].sample_rate, rate, quality="HQ")


@pytest.mark.parametrize(("format", "subtype"), SOUND_KINDS)
def test_every_format_reads_as_soundfile_and_soxr_read_it(format: str, subtype: str | None) -> None:
    data = sound_bytes(format, subtype)
    samples = decode_audio(data, 16_000, LIMITS)
    assert samples.dtype == np.float32
    assert samples.shape == plain_samples(data, 16_000).shape
    np.testing.assert_allclose(samples, plain_samples(data, 16_000), atol=1e-6)


@pytest.mark.parametrize(("format", "codec"), CONTAINER_KINDS)
def test_containers_that_soundfile_lacks_are_read_too(format: str, codec: str) -> None:
    data = container_sound_bytes(format, codec)
    samples = decode_audio(data, 16_000, LIMITS)
    np.testing.assert_allclose(samples, plain_container_samples(data, 16_000), atol=1e-6)
    assert len(samples) == pytest.approx(8_000, abs=1_200)
    assert 0.3 < np.abs(samples).max() <= 1


def test_many_blocks_join_without_a_seam() -> None:
    data = sound_bytes(samples=tone(8, 44_100, 2))
    np.testing.assert_allclose(decode_audio(data, 16_000, LIMITS), plain_samples(data, 16_000), atol=1e-6)


def test_the_same_rate_is_left_as_it_is_and_channels_are_averaged() -> None:
    samples = tone(0.2, 44_100, 3)
    data = sound_bytes("WAV", "FLOAT", samples)
    np.testing.assert_allclose(decode_audio(data, 44_100, LIMITS), samples.mean(1), atol=1e-7)


def wav_header(rate: int, channels: int, data_bytes: int) -> bytes:
    form = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", data_bytes)
    return b"RIFF" + struct.pack("<I", len(head) + data_bytes) + head


def test_a_long_silence_is_refused_by_its_header() -> None:
    out = io.BytesIO()
    with soundfile.SoundFile(out, "w", 8_000, 1, format="FLAC") as file:
        for _ in range(70):
            file.write(np.zeros(8_000 * 60, np.int16))
    assert len(out.getvalue()) < 1 << 20
    start = time.thread_time()
    with pytest.raises(TooLarge, match="1800 s"):
        decode_audio(out.getvalue(), 16_000, LIMITS)
    assert time.thread_time() - start < 1.0


def test_a_header_that_promises_what_is_not_there_costs_nothing() -> None:
    start = time.thread_time()
    with pytest.raises((BadMedia, TooLarge)):
        decode_audio(wav_header(16_000, 1, 0x7FFF_FFF0), 16_000, LIMITS)
    assert time.thread_time() - start < 1.0


@pytest.mark.parametrize(
    "data",
    [b"", bytes(1000), b"#EXTM3U\nfile:///etc/hostname\n", wav_header(1, 1, 8) + bytes(8), wav_header(16_000, 1, 0)],
)
def test_what_is_no_sound_is_an_error(data: bytes) -> None:
    with pytest.raises(BadMedia):
        decode_audio(data, 16_000, LIMITS)


def test_a_video_without_sound_and_samples_that_are_no_number_are_errors() -> None:
    with pytest.raises(BadMedia, match="holds no audio"):
        decode_audio(video_bytes(frames=2), 16_000, LIMITS)
    with pytest.raises(BadMedia, match="finite"):
        decode_audio(sound_bytes("WAV", "FLOAT", np.full((100, 1), np.nan, np.float32)), 16_000, LIMITS)


@pytest.mark.parametrize(
    "data", [sound_bytes(), container_sound_bytes("mp4", "aac"), container_sound_bytes("adts", "aac")]
)
def test_each_limit_is_named(data: bytes) -> None:
    for limits, words in [
        (MediaLimits(max_audio_seconds=0.25), "0.25 s"),
        (MediaLimits(max_bytes=100), "100 bytes"),
        (MediaLimits(decode_seconds=0), "0 s"),
    ]:
        with pytest.raises(TooLarge, match=words):
            decode_audio(data, 16_000, limits)
