"""The frames of a pushed embedding: a msgpack header, then the raw bytes. Shared by the server and `client`.

Two ZMQ frames per part. Frame 0: `EmbeddingHeader` in msgpack. Frame 1: the embedding, contiguous, row-major,
little-endian, `shape` = [tokens, dim] of `dtype`. A part that failed is one frame, its header's `error` set;
so is a part that the receiver asked to read by NIXL, its header's `memory` set.
"""

from __future__ import annotations

import msgspec

from encode_server.wire.modality import Modality

VERSION = 1
"""Of the frames. It grows when a reader of the present version could not read the frames; see docs/stability.md."""

MEMORY_VERSION = 2
"""Of a header with `memory`, which only a receiver that asked for it gets."""


class ItemInfo(msgspec.Struct, omit_defaults=False):
    """One media item of a part: its rows in the embedding, its patch grid, the SHA-256 of its media bytes.

    `cached`: the item was not encoded for this request, the cache or another request's encode served the embedding.
    `metadata`: what an engine that has the embedding needs in place of the media, see `wire.metadata`; None where that
    is not known.
    """

    tokens: int
    grid_thw: list[int] | None
    content_hash: str
    cached: bool = False
    metadata: dict[str, list[int | float]] | None = None


class ErrorInfo(msgspec.Struct):
    """Why a part failed: the HTTP status, the code and the message its POST was answered with."""

    status: int
    code: str
    message: str


class RemoteMemory(msgspec.Struct):
    """Where the embedding is to be read, by NIXL, in place of frame 1: `address` in the memory of the agent `name`,
    whose metadata is `agent`. `tag`: what the reader notifies the agent of when it has read. `crc`: CRC-32 of the
    embedding, because the memory holds another embedding by the time a late reader comes."""

    name: str
    agent: bytes
    address: int
    tag: bytes
    crc: int


class EmbeddingHeader(msgspec.Struct):
    """What a receiver needs to place one part of a request. `dtype` is `float32`, `float16` or `bfloat16`. `version`:
    of the frames; a header without it is of version 1."""

    req_id: str
    model: str
    modality: Modality
    part_idx: int = 0
    num_parts: int = 1
    dtype: str = ""
    shape: tuple[int, int] = (0, 0)
    items: list[ItemInfo] = []
    error: ErrorInfo | None = None
    memory: RemoteMemory | None = None
    version: int = VERSION


encode_header = msgspec.msgpack.Encoder().encode
decode_header = msgspec.msgpack.Decoder(EmbeddingHeader).decode
