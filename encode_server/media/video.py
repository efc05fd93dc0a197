"""Video bytes to the frames that a checkpoint's video processor chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from encode_server.errors import BadMedia, EncodeError, TooLarge
from encode_server.media.container import VIDEO_DECODERS, open_container, pick_stream
from encode_server.media.guard import decoding
from encode_server.media.limits import MediaLimits, Stopwatch

# A decoder's reference frames (up to 16 of H.264, 1.5 bytes a pixel) and the frame that is converted to RGB, twice.
_DECODER_BYTES_PER_PIXEL = 32


@dataclass(frozen=True)
class VideoInfo:
    """What is known about a video before its frames are chosen.

    `total_num_frames`: frames that a full decode gives. `fps`: average frames per second. `duration`: seconds.
    `width`, `height`: pixels of a frame as displayed, that is, after rotation.
    """

    total_num_frames: int
    fps: float
    duration: float
    width: int
    height: int

    @property
    def frame_bytes(self) -> int:
        """Bytes of a decoded frame."""
        return self.width * self.height * 3


def decode_video(
    data: bytes, choose: Callable[[VideoInfo], Sequence[int]], limits: MediaLimits
) -> tuple[npt.NDArray[np.uint8], VideoInfo]:
    """Decode the frames whose indices `choose` returns for this video.

    Returns uint8 RGB frames [n, height, width, 3], in the order of the indices (an index may repeat), and the info they
    were chosen from. Frames are numbered from 0 in display order, as a full decode gives them, and turned upright if
    the container says so. Only the chosen ones are held in memory.

    A container's frame count can be missing or wrong, so frames are counted in the decode itself: where it finds
    another number than the packets promised, `choose` is called again with the right one.

    Raises `BadMedia` for bytes that are no video of a supported format, `TooLarge` beyond a limit, and whatever
    `choose` raises; `ValueError` if it returns no index or one out of range.
    """
    limits.check_bytes(len(data))
    watch = Stopwatch(limits.decode_seconds)
    with decoding("video"):
        info = _inspect(data, limits, watch)
    while True:
        indices = _checked(choose(info), info, limits)
        with decoding("video"):
            frames, total = _extract(data, indices, info, limits, watch)
        if total == info.total_num_frames:
            return frames, info
        if total == 0:
            raise BadMedia("the video holds no frame")
        del frames  # before as many again are decoded
        info = replace(info, total_num_frames=total)


def video_bytes(data: bytes, choose: Callable[[VideoInfo], Sequence[int]], limits: MediaLimits) -> int:
    """The most bytes that `decode_video` holds beside `data`, from the header alone.

    The header tells the size of a frame and, in some formats, the number of frames; a video without that number counts
    as long as it may be. Where `choose` cannot choose from what the header tells, all frames count.

    Raises what `decode_video` raises for the same header.
    """
    limits.check_bytes(len(data))
    with decoding("video"), open_container(data, limits) as container:
        stream = _open_stream(container, limits)
        width, height = int(stream.codec_context.width), int(stream.codec_context.height)
        frames = min(int(stream.frames) or limits.max_frames, limits.max_frames)
        fps = _frame_rate(stream, frames, limits.max_video_seconds)
    try:
        frames = len(choose(VideoInfo(frames, fps, frames / fps, width, height)))
    except (EncodeError, ValueError):
        pass  # the header may be wrong; the decode asks again, with the right number
    pixels = width * height
    return min(frames * pixels * 3, limits.max_decoded_bytes) + pixels * _DECODER_BYTES_PER_PIXEL


def _inspect(data: bytes, limits: MediaLimits, watch: Stopwatch) -> VideoInfo:
    """Read every packet, but decode the first frame only: a header's size and rotation can be wrong."""
    first: Any = None
    packets = 0
    start = end = None
    with open_container(data, limits) as container:
        stream = _open_stream(container, limits)
        time_base = stream.time_base
        for packet in container.demux(stream):
            watch.check()
            if first is None:
                first = next(iter(packet.decode()), None)
            if packet.size == 0 or packet.is_discard:
                continue
            packets += 1
            if packets > limits.max_frames:
                raise TooLarge(f"the video has more than {limits.max_frames} frames")
            if packet.pts is None or time_base is None:
                continue
            start = packet.pts if start is None else min(start, packet.pts)
            stop = packet.pts + (packet.duration or 0)
            end = stop if end is None else max(end, stop)
            if (end - start) * time_base > limits.max_video_seconds:
                raise TooLarge(f"the video is longer than {limits.max_video_seconds:g} s")
        if first is None:
            raise BadMedia("the video holds no frame")
        height, width = first.height, first.width
        if _quarter_turns(first) % 2:
            height, width = width, height
        seconds = float((end - start) * time_base) if start is not None and end is not None else 0.0
        fps = _frame_rate(stream, packets, seconds)
    return VideoInfo(packets, fps, seconds if seconds > 0 else packets / fps, width, height)


def _extract(
    data: bytes, indices: Sequence[int], info: VideoInfo, limits: MediaLimits, watch: Stopwatch
) -> tuple[npt.NDArray[np.uint8], int]:
    """The chosen frames, and the number of frames in the whole video. Frames beyond its end are left unset."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(index, []).append(place)
    out = np.empty((len(indices), info.height, info.width, 3), np.uint8)
    number = 0
    with open_container(data, limits) as container:
        stream = _open_stream(container, limits)
        for frame in container.decode(stream):
            watch.check()
            if number >= limits.max_frames:
                raise TooLarge(f"the video has more than {limits.max_frames} frames")
            if number in places:
                out[places[number]] = _to_rgb(frame, info)
            number += 1
    return out, number


def _open_stream(container: Any, limits: MediaLimits) -> Any:
    stream = pick_stream(container, "video", VIDEO_DECODERS)
    context = stream.codec_context
    limits.check_pixels(context.width, context.height)
    # A stream may change its size on the way; the decoder refuses what the header didn't announce.
    context.options = {"max_pixels": str(limits.max_pixels)}
    # Many videos are decoded concurrently, so a decoder needs no threads of its own. Such threads could also deadlock:
    # where a library has set PyAV's log level, they wait for the interpreter lock in order to log, while the thread
    # that holds the lock waits for them.
    context.thread_count = 1
    return stream


def _to_rgb(frame: Any, info: VideoInfo) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    pixels = np.rot90(pixels, _quarter_turns(frame))
    if pixels.shape != (info.height, info.width, 3):
        raise BadMedia("the size of the frames changes within the video")
    return pixels


def _quarter_turns(frame: Any) -> int:
    """Counter-clockwise quarter turns that bring a frame upright."""
    return round(float(frame.rotation) / 90) % 4


def _frame_rate(stream: Any, frames: int, seconds: float) -> float:
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and 0 < rate <= 1000:
            return float(rate)
    return frames / seconds if seconds > 0 else 1.0


def _checked(indices: Sequence[int], info: VideoInfo, limits: MediaLimits) -> list[int]:
    chosen = [int(index) for index in indices]
    if not chosen or min(chosen) < 0 or max(chosen) >= info.total_num_frames:
        raise ValueError(f"expected frame indices below {info.total_num_frames}, got {chosen[:8]}")
    size = len(chosen) * info.frame_bytes
    if size > limits.max_decoded_bytes:
        raise TooLarge(
            f"{len(chosen)} frames of {info.width} x {info.height} pixels take {size} bytes, "
            f"more than {limits.max_decoded_bytes}: ask for fewer frames or send a smaller video"
        )
    return chosen
