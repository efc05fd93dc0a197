"""Audio bytes to samples at the rate that a feature extractor wants."""

from __future__ import annotations

import math
from collections.abc import Iterator
from io import BytesIO

import av
import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from encode_server.errors import BadMedia, TooLarge
from encode_server.media.container import AUDIO_DECODERS, open_container, pick_stream
from encode_server.media.guard import decoding
from encode_server.media.layouts import refuse_listed, replace_listed
from encode_server.media.limits import MediaLimits, Stopwatch

Samples = npt.NDArray[np.float32]

_SOUNDFILE_FORMATS = frozenset({"AIFF", "AU", "CAF", "FLAC", "MP3", "OGG", "RF64", "W64", "WAV", "WAVEX"})
_BLOCK = 1 << 16
# Beyond these a header is wrong or an attack: resampling cost grows with the quotient of the rates.
_RATES = (1_000, 768_000)


def decode_audio(data: bytes, sampling_rate: int, limits: MediaLimits) -> Samples:
    """Decode `data` to mono at `sampling_rate` (Hz): float32 [samples], nominally within [-1, 1].

    The channels are averaged. Audio of another rate is resampled by soxr (HQ). The header's length is checked before
    the decode and the number of samples during it, so at most `limits.max_audio_seconds` are held at any time.

    Raises `BadMedia` for bytes that are no audio of a supported format, `TooLarge` beyond a limit.
    """
    limits.check_bytes(len(data))
    watch = Stopwatch(limits.decode_seconds)
    with decoding("audio"):
        samples = _resample(_blocks(data, limits), sampling_rate, limits, watch)
        if not samples.size:
            raise BadMedia("the audio has no samples")
        if not np.isfinite(samples).all():
            raise BadMedia("the audio has samples that are not finite numbers")
        return samples


def audio_bytes(data: bytes, sampling_rate: int, limits: MediaLimits) -> int:
    """The most bytes that `decode_audio` holds beside `data`, from the header's length.

    Audio whose header has no length counts as `limits.max_audio_seconds` long. The header of an MP4 or Matroska file
    may tell too short a length; `limits` bounds what such a file takes.

    Raises `BadMedia` for bytes that are no audio of a supported format, `TooLarge` beyond a limit.
    """
    limits.check_bytes(len(data))
    with decoding("audio"):
        seconds = min(_declared_seconds(data, limits) or limits.max_audio_seconds, limits.max_audio_seconds)
    # The resampled blocks, and the array that they are joined to.
    return 2 * 4 * math.ceil(seconds * sampling_rate) + 4 * _BLOCK


def _declared_seconds(data: bytes, limits: MediaLimits) -> float | None:
    file = _open_soundfile(data)
    if file is not None:
        with file:
            return float(file.frames / file.samplerate)
    with open_container(data, limits) as container:
        stream = pick_stream(container, "audio", AUDIO_DECODERS)
        return float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None


def _blocks(data: bytes, limits: MediaLimits) -> Iterator[tuple[int, Samples]]:
    """Mono blocks, each with its rate (Hz), decoded by libsndfile if that library knows the format, else by FFmpeg."""
    file = _open_soundfile(data)
    return _pyav_blocks(data, limits) if file is None else _soundfile_blocks(file, limits)


def _open_soundfile(data: bytes) -> soundfile.SoundFile | None:
    """The file as libsndfile reads it, None for a format that is left to FFmpeg."""
    try:
        file = soundfile.SoundFile(BytesIO(data))
    except soundfile.LibsndfileError:
        return None
    if file.format not in _SOUNDFILE_FORMATS:
        file.close()
        return None
    return file


def _soundfile_blocks(file: soundfile.SoundFile, limits: MediaLimits) -> Iterator[tuple[int, Samples]]:
    with file:
        _check_seconds(file.frames, file.samplerate, limits)
        # Some headers allow 1024 channels.
        frames = max(1, _BLOCK // file.channels)
        while len(block := file.read(frames, dtype="float32", always_2d=True)):
            yield file.samplerate, _mono(block)


def _pyav_blocks(data: bytes, limits: MediaLimits) -> Iterator[tuple[int, Samples]]:
    with open_container(data, limits) as container:
        stream = pick_stream(container, "audio", AUDIO_DECODERS)
        if stream.duration and stream.time_base and stream.duration * stream.time_base > limits.max_audio_seconds:
            raise TooLarge(f"the audio is longer than {limits.max_audio_seconds:g} s")
        replace_listed(stream.codec_context)
        to_float: av.AudioResampler | None = None
        for frame in container.decode(stream):
            refuse_listed(frame)
            if to_float is None:
                # Rate and layout stay as they are: FFmpeg's own mixing is not the mean of the channels.
                # Packed samples have one plane. Planar samples have one for each channel, and with eight or more
                # channels PyAV reads past the array of planes, which crashes the process.
                to_float = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate)
            for converted in to_float.resample(frame):
                if converted.format.name != "flt":
                    raise BadMedia("the sample format changes within the audio")
                yield converted.sample_rate, _mono(converted.to_ndarray().reshape(-1, converted.layout.nb_channels))


def _mono(block: Samples) -> Samples:
    """The mean of the channels: float32 [samples] from float32 [samples, channels].

    Summing whole channels is several times faster than summing each sample's few values.
    """
    mean: Samples = np.ascontiguousarray(block.T).mean(axis=0)
    return mean


def _resample(blocks: Iterator[tuple[int, Samples]], rate: int, limits: MediaLimits, watch: Stopwatch) -> Samples:
    parts: list[Samples] = []
    source_rate = 0
    frames = 0
    resampler: soxr.ResampleStream | None = None
    for block_rate, block in blocks:
        watch.check()
        if not source_rate:
            source_rate = block_rate
            resampler = _resampler(source_rate, rate)
        elif block_rate != source_rate:
            raise BadMedia("the sampling rate changes within the audio")
        frames += len(block)
        _check_seconds(frames, source_rate, limits)
        parts.append(block if resampler is None else resampler.resample_chunk(block))
    if resampler is not None:
        parts.append(resampler.resample_chunk(np.empty(0, np.float32), last=True))
    return np.concatenate(parts) if parts else np.empty(0, np.float32)


def _resampler(source_rate: int, rate: int) -> soxr.ResampleStream | None:
    if not _RATES[0] <= source_rate <= _RATES[1]:
        raise BadMedia(f"the audio's sampling rate is {source_rate} Hz, expected {_RATES[0]} to {_RATES[1]}")
    if source_rate == rate:
        return None
    return soxr.ResampleStream(source_rate, rate, 1, dtype="float32", quality="HQ")


def _check_seconds(frames: int, rate: int, limits: MediaLimits) -> None:
    if frames > limits.max_audio_seconds * rate:
        raise TooLarge(f"the audio is longer than {limits.max_audio_seconds:g} s")
