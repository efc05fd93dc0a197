"""What a caller may name as media, and the items of a request body made from it."""

from __future__ import annotations

import asyncio
from binascii import b2a_base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

IN_PLACE_BYTES = 64 * 1024
# A multiple of 3, so that the pieces' base64 joins without padding between them.
PIECE_BYTES = 3 * 128 * 1024


@dataclass(frozen=True, slots=True)
class Item:
    """One media item with options of its own.

    `media`: a URL, data URI or bare base64 (`str`), the file's content (`bytes`), or a local file (`Path`).
    `min_pixels`, `max_pixels`: bounds of an image's or frame's area. `fps`: frames sampled per second of video, at most
    `max_frames` of them. `content_hash`: `sha256:<hex>` of the media bytes, verified by the server. None leaves the
    server's own choice.
    """

    media: str | bytes | Path
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    content_hash: str | None = None


Media = str | bytes | Path | Item


async def wire_items(media: Sequence[Media]) -> list[object]:
    """The `mm_items` of a request: strings as they are, bytes and files as base64, made in a thread when large.

    Raises `OSError` for a file that can't be read, `ValueError` for no media, `TypeError` for anything else than media.
    """
    if isinstance(media, str | bytes | Path | Item):
        raise TypeError("media is a list of items, also for one item")
    if not media:
        raise ValueError("no media given")
    return [await _wire_item(item) for item in media]


async def _wire_item(item: Media) -> object:
    if not isinstance(item, Item):
        return await _wire_source(item)
    options = {name: getattr(item, name) for name in Item.__slots__ if name != "media"}
    return {"url": await _wire_source(item.media)} | {k: v for k, v in options.items() if v is not None}


async def _wire_source(media: str | bytes | Path) -> str | msgspec.Raw:
    if isinstance(media, str):
        return media
    if isinstance(media, Path):
        return await asyncio.to_thread(lambda: _quoted_base64(media.read_bytes()))
    if not isinstance(media, bytes | bytearray | memoryview):
        raise TypeError(f"media is a str, bytes, Path or Item, not {type(media).__name__}")
    if len(media) <= IN_PLACE_BYTES:
        return _quoted_base64(media)
    return await asyncio.to_thread(_quoted_base64, media)


def _quoted_base64(data: bytes) -> msgspec.Raw:
    """A JSON string, ready for the encoder. In pieces: one call for all of it would keep the GIL from the loop."""
    view = memoryview(data).cast("B")
    pieces = [b2a_base64(view[i : i + PIECE_BYTES], newline=False) for i in range(0, len(view), PIECE_BYTES)]
    return msgspec.Raw(b'"' + b"".join(pieces) + b'"')
