"""An embedding as a value of the shared cache: a head that says whose it is, the raw bytes, and a checksum over both.

4 bytes   ESV1
4 bytes   CRC-32 of the head and the embedding, little-endian
4 bytes   length of the head
head      msgpack, then zeros until the embedding begins at a multiple of 64
embedding [tokens, dim] values, row-major, little-endian
"""

from __future__ import annotations

import hashlib
import struct
import zlib

import msgspec

from encode_server.pipeline.cache import CacheKey
from encode_server.wire.embedding import EncodedItem, embedding_bytes
from encode_server.wire.frames import ItemInfo

MAGIC = b"ESV1"
PREFIX = "encode-server:1:"  # of every key; the number is that of the values' format
ALIGNMENT = 64
_START = struct.Struct("<4sII")


class Garbled(Exception):
    """Not what was stored: cut short, changed, or another key's value."""


class Kind(msgspec.Struct, frozen=True):
    """What the embeddings of a server depend on beside media and options. `fingerprint`: see `models.fingerprint`.
    `dim`: of the modality that is asked for."""

    fingerprint: str
    dtype: str
    dim: int


class _Head(msgspec.Struct):
    key: str
    dtype: str
    dim: int
    tokens: int
    grid_thw: list[int] | None
    content_hash: str
    extra: dict[str, float | int | list[float]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Head).decode


def key_of(key: CacheKey, kind: Kind) -> str:
    """The name of an embedding: equal on all servers whose embeddings are interchangeable, and on no others."""
    what = _encode((kind.fingerprint, kind.dtype, kind.dim, key.modality, key.digest, key.options))
    return PREFIX + hashlib.sha256(what).hexdigest()


def pack(key: str, item: EncodedItem, kind: Kind) -> list[bytes | memoryview]:
    """The value, in pieces: the embedding is not copied."""
    info = item.info
    head = _encode(_Head(key, kind.dtype, kind.dim, info.tokens, info.grid_thw, info.content_hash, item.extra))
    padded = head + bytes(-(_START.size + len(head)) % ALIGNMENT)
    checksum = zlib.crc32(item.data, zlib.crc32(padded))
    return [_START.pack(MAGIC, checksum, len(head)) + padded, item.data]


def unpack(key: str, value: memoryview, kind: Kind) -> EncodedItem:
    """The embedding in a value, a view of it. Raises Garbled unless it is exactly what was stored under `key`."""
    if len(value) < _START.size:
        raise Garbled(f"{len(value)} bytes")
    magic, checksum, length = _START.unpack_from(value)
    if magic != MAGIC or zlib.crc32(value[_START.size :]) != checksum:
        raise Garbled("the checksum is another")
    start = _START.size + length
    try:
        head = _decode(value[_START.size : start])
    except msgspec.MsgspecError:
        raise Garbled("no head") from None
    if (head.key, head.dtype, head.dim) != (key, kind.dtype, kind.dim):
        raise Garbled("the value is another key's")
    data = value[start + -start % ALIGNMENT :]
    if head.tokens < 0 or embedding_bytes(head.tokens, head.dim, head.dtype) != len(data):
        raise Garbled("another size than the head says")
    return EncodedItem(ItemInfo(head.tokens, head.grid_thw, head.content_hash), head.extra, data)
