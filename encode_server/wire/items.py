"""What a request may say of one media item."""

from __future__ import annotations

import msgspec

from encode_server.wire.pools import Pool


class ItemOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """Per-item options; None leaves the checkpoint's own setting.

    `min_pixels` and `max_pixels` bound the resized image, or one frame of a video as the checkpoint's video processor
    counts it; `fps` (frames per second of video) or `num_frames`, and `min_frames`, `max_frames`, choose frames.
    `max_side`: an image is shrunk before all else so that no side is longer, in pixels. `pool`: one vector in place of
    the rows.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    max_side: int | None = None
    pool: Pool | None = None
