"""Which encoder a media item belongs to, so that its cache sees the item again."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from encode_server.client.media import Item, Media, Written

T = TypeVar("T")

SAMPLE_BYTES = 64 * 1024


def item_key(media: Media) -> bytes:
    """A short name for an item's content. Of large contents only both ends and the size count: it is a hint."""
    digest = blake2b(digest_size=16)
    source: Media | Written = media
    if isinstance(source, Item):
        if source.content_hash is not None:
            return source.content_hash.encode()
        source = source.media
    if isinstance(source, Path):
        source = str(source)
    assert not isinstance(source, Item)
    head, tail, size = _sampled(source)
    digest.update(head)
    digest.update(tail)
    digest.update(size.to_bytes(8, "little"))
    return digest.digest()


def by_affinity(key: bytes, named: Sequence[tuple[str, T]]) -> list[T]:
    """The members, `key`'s favourite first. When a member leaves, only its own keys move (rendezvous hashing)."""
    scored = sorted(named, key=lambda member: blake2b(member[0].encode(), key=key[:64]).digest())
    return [member for _, member in scored]


def _sampled(source: str | bytes | Written) -> tuple[bytes, bytes, int]:
    """Both ends of a source, alike for a string and for its JSON, and the length."""
    if isinstance(source, Written):
        prefix, text = source.inside
        head, tail = prefix + bytes(text[:SAMPLE_BYTES]), prefix + bytes(text[-SAMPLE_BYTES:])
        return head[:SAMPLE_BYTES], tail[-SAMPLE_BYTES:], len(prefix) + len(text)
    head, tail = (
        end.encode(errors="replace") if isinstance(end, str) else end
        for end in (source[:SAMPLE_BYTES], source[-SAMPLE_BYTES:])
    )
    return head, tail, len(source)
