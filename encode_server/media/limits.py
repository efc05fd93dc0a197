"""What one media item may cost, and a stopwatch that ends a decode after its time."""

from __future__ import annotations

import time
from dataclasses import dataclass

from encode_server.errors import TooLarge

_MIB = 1 << 20


@dataclass(frozen=True)
class MediaLimits:
    """Bounds for one media item. Each bound is checked as early as possible; an item above a bound is `TooLarge`.

    `max_bytes`: compressed bytes of one item, from any source.
    `max_pixels`: width x height of an image or of one video frame, checked before it is decoded.
    `image_reads`: reads of an image's file while it is opened and decoded, slow formats apart. Pillow reads headers in
    Python, piece by piece: a PNG of 64 MB may have five million chunks, which take minutes. Large photographs take
    thousands of reads.
    `max_frames`: frames in one video. `max_video_seconds`, `max_audio_seconds`: its length in seconds.
    `max_decoded_bytes`: bytes of the chosen frames of one video as uint8 RGB.
    `max_ratio`: decoded bytes of an image for each compressed byte; images below `ratio_floor_bytes` decoded bytes
    are exempt, because small flat images compress to almost nothing. Video and audio have no ratio for the same reason:
    their frames, seconds and decoded bytes are bounded instead.
    `decode_seconds`: time for one decode, checked between frames or blocks.
    `slow_formats`: whether image formats are decoded that are slow or rare, see `image.SLOW_FORMATS`.
    `white_behind`: whether transparent images are laid on white, see `image.decode_image`.
    `redirects`: redirects followed for one URL. `fetch_seconds`: time for one URL, from name resolution to last byte.
    """

    max_bytes: int = 64 * _MIB
    max_pixels: int = 64_000_000
    image_reads: int = 200_000
    max_frames: int = 36_000
    max_video_seconds: float = 3600.0
    max_audio_seconds: float = 1800.0
    max_decoded_bytes: int = 2048 * _MIB
    max_ratio: float = 300.0
    ratio_floor_bytes: int = 64 * _MIB
    decode_seconds: float = 30.0
    slow_formats: bool = False
    white_behind: bool = False
    redirects: int = 5
    fetch_seconds: float = 20.0

    def check_bytes(self, size: int) -> None:
        """Raise `TooLarge` if `size` compressed bytes are more than `max_bytes`."""
        if size > self.max_bytes:
            raise TooLarge(f"the media is larger than {self.max_bytes} bytes")

    def check_pixels(self, width: int, height: int) -> None:
        """Raise `TooLarge` if an image or a frame of this size has more than `max_pixels` pixels."""
        if width * height > self.max_pixels:
            raise TooLarge(f"the image has {width} x {height} pixels, more than {self.max_pixels} in all")


class Stopwatch:
    """Holds a decode to `seconds`, counted from construction."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise `TooLarge` if the time is up."""
        if time.monotonic() > self._end:
            raise TooLarge(f"decoding the media takes longer than {self._seconds:g} s")
