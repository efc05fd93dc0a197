"""The embedding of a request, item by item."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from encode_server.wire.dtypes import ITEM_BYTES
from encode_server.wire.frames import ItemInfo
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality


@dataclass(frozen=True)
class EncodedItem:
    """An item's embedding: `data` holds tokens × dim values, never written to again. `options`: those that the item was
    encoded with, where that is known."""

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


class OutgoingRoom(Protocol):
    """Memory from which a transport sends, see `delivery.outgoing.Outgoing`."""

    def copy(self, *pieces: memoryview) -> memoryview | None:
        """The pieces one after another, in this memory; None where there is no room for them. Never waits."""

    def holds(self, data: memoryview) -> bool:
        """Whether the bytes lie in this memory."""


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

    def contiguous(self, room: OutgoingRoom | None = None) -> memoryview:
        """The whole embedding as one buffer, in `room` where there is any: what lies there is not copied again. Else
        the item's own buffer where there is one item, and a copy on the heap of several.

        The view is the caller's own, to be released: whoever still refers to the view holds no room then.
        """
        pieces = [item.data for item in self.items]
        alone = pieces[0] if len(pieces) == 1 else None
        if alone is not None and (room is None or room.holds(alone)):
            return alone[:]
        if room is not None and (copied := room.copy(*pieces)) is not None:
            return copied
        if alone is not None:
            return alone[:]
        joined = memoryview(bytearray(self.nbytes))  # to assign to the array itself would copy each piece twice
        offset = 0
        for piece in pieces:
            joined[offset : offset + piece.nbytes] = piece.cast("B")
            offset += piece.nbytes
        return joined


@contextlib.contextmanager
def releasing(view: memoryview) -> Iterator[memoryview]:
    """Release the view at the end, unless somebody reads from it still: an error's traceback keeps names alive."""
    try:
        yield view
    finally:
        with contextlib.suppress(BufferError):
            view.release()


def embedding_bytes(tokens: int, dim: int, dtype: str) -> int:
    """Bytes of [tokens, dim] values."""
    return math.prod((tokens, dim, ITEM_BYTES[dtype]))
