"""Which encoder a media item belongs to, so that its cache sees the item again."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from encode_server.client.media import Item, Media

T = TypeVar("T")

SAMPLE_BYTES = 64 * 1024


def item_key(media: Media) -> bytes:
    """A short name for an item's content. Of large contents only both ends and the size count: it is a hint."""
    digest = blake2b(digest_size=16)
    if isinstance(media, Item):
        if media.content_hash is not None:
            return media.content_hash.encode()
        media = media.media
    if isinstance(media, Path):
        media = str(media)
    ends = (media[:SAMPLE_BYTES], media[-SAMPLE_BYTES:])
    for end in ends:
        digest.update(end.encode(errors="replace") if isinstance(end, str) else end)
    digest.update(len(media).to_bytes(8, "little"))
    return digest.digest()


def by_affinity(key: bytes, named: Sequence[tuple[str, T]]) -> list[T]:
    """The members, `key`'s favourite first. When a member leaves, only its own keys move (rendezvous hashing)."""
    scored = sorted(named, key=lambda member: blake2b(member[0].encode(), key=key[:64]).digest())
    return [member for _, member in scored]
