"""The embedding of a request, item by item."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from encode_server.wire.dtypes import ITEM_BYTES
from encode_server.wire.frames import ItemInfo
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality


@dataclass(frozen=True)
class EncodedItem:
    """An item's embedding: `data` holds tokens × dim values on the heap, never written to again. `options`: those that
    it was encoded with, where that is known."""

    info: ItemInfo
    extra: dict[str, float | int | list[float]]
    data: memoryview
    options: ItemOptions | None = None


@dataclass(frozen=True)
class Wanted:
    """An item's embedding, as far as anything is known before the item is encoded. `uuid`: the item's name in a store.
    `digest`: of the media's bytes."""

    uuid: str | None
    options: ItemOptions
    modality: Modality
    digest: str
    model: str
    dtype: str
    dim: int


Recall = Callable[[Wanted, Callable[[int], None]], Awaitable[EncodedItem | None]]
"""Finds an embedding where a former request has left it; told of its bytes before they are read."""


@dataclass
class Encoded:
    """All items of a request, encoded: [tokens, dim] when put one after another."""

    modality: Modality
    model: str
    dtype: str
    dim: int
    items: list[EncodedItem]

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens of all items, dim)."""
        return sum(item.info.tokens for item in self.items), self.dim

    @property
    def nbytes(self) -> int:
        """Size of the embedding in bytes."""
        return embedding_bytes(*self.shape, self.dtype)

    def contiguous(self) -> memoryview:
        """The whole embedding as one buffer: the item's own where there is one item, else a copy."""
        if len(self.items) == 1:
            return self.items[0].data
        joined = bytearray(self.nbytes)
        offset = 0
        for item in self.items:
            joined[offset : offset + item.data.nbytes] = item.data
            offset += item.data.nbytes
        return memoryview(joined)


def embedding_bytes(tokens: int, dim: int, dtype: str) -> int:
    """Bytes of [tokens, dim] values."""
    return math.prod((tokens, dim, ITEM_BYTES[dtype]))
