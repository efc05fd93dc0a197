"""What a caller may name as media, and the items of a request body made from it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pybase64

IN_PLACE_BYTES = 64 * 1024
# A multiple of 3, so that the pieces' base64 joins without padding between them.
PIECE_BYTES = 3 * 128 * 1024


@dataclass(frozen=True, slots=True)
class Written:
    """A URL, data URI or bare base64 that is JSON already, quotes included: it is sent on without a copy.

    `prefix`: JSON without quotes that is to stand before the text of `json`.
    """

    json: memoryview
    prefix: bytes = b""

    @property
    def inside(self) -> tuple[bytes, memoryview]:
        """What stands between the quotes, in pieces."""
        return self.prefix, self.json[1:-1]


@dataclass(frozen=True, slots=True)
class Item:
    """One media item with options of its own.

    `media`: a URL, data URI or bare base64 (`str`), the file's content (`bytes`), or a local file (`Path`).
    `min_pixels`, `max_pixels`: bounds of an image's or frame's area. `fps`: frames sampled per second of video, at most
    `max_frames` of them. `max_long_side_pixel`: longest side an image may have; `detail`: `low` means 512 of these.
    `content_hash`: `sha256:<hex>` of the media bytes, verified by the server. `uuid`: the name of its embedding in a
    store. None leaves the server's own choice.
    """

    media: str | bytes | Path | Written
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: float | None = None
    max_frames: int | None = None
    max_long_side_pixel: int | None = None
    detail: str | None = None
    content_hash: str | None = None
    uuid: str | None = None


Media = str | bytes | Path | Item


Piece = bytes | bytearray | memoryview


async def items_json(media: Sequence[Media]) -> list[Piece]:
    """The `mm_items` of a request as JSON in pieces to be sent one after another, none of them joined.

    Strings go as they are, bytes and files as base64, made in a thread when large. Raises `OSError` for a file that
    can't be read, `ValueError` for no media, `TypeError` for anything else than media.
    """
    if isinstance(media, str | bytes | Path | Item):
        raise TypeError("media is a list of items, also for one item")
    if not media:
        raise ValueError("no media given")
    pieces: list[Piece] = []
    for item in media:
        pieces += [b"," if pieces else b"[", *await _item_json(item)]
    return [*pieces, b"]"]


async def _item_json(item: Media) -> list[Piece]:
    if not isinstance(item, Item):
        return await _source_json(item)
    options = {name: getattr(item, name) for name in Item.__slots__ if name != "media"}
    given = {name: value for name, value in options.items() if value is not None}
    rest = b"," + msgspec.json.encode(given)[1:] if given else b"}"
    return [b'{"url":', *await _source_json(item.media), rest]


async def _source_json(media: str | bytes | Path | Written) -> list[Piece]:
    if isinstance(media, Written):
        return [b'"', *media.inside, b'"'] if media.prefix else [media.json]
    if isinstance(media, str):
        return [msgspec.json.encode(media)]
    if isinstance(media, Path):
        return await asyncio.to_thread(lambda: _base64_json(media.read_bytes()))
    if not isinstance(media, bytes | bytearray | memoryview):
        raise TypeError(f"media is a str, bytes, Path or Item, not {type(media).__name__}")
    if len(media) <= IN_PLACE_BYTES:
        return _base64_json(media)
    return await asyncio.to_thread(_base64_json, media)


def _base64_json(data: bytes) -> list[Piece]:
    # In pieces: one call for all of it would keep the GIL from the loop.
    view = memoryview(data).cast("B")
    pieces: list[Piece] = [pybase64.b64encode(view[i : i + PIECE_BYTES]) for i in range(0, len(view), PIECE_BYTES)]
    return [b'"', *pieces, b'"']
