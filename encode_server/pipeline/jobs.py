"""A job: one media item on its way through the engine. It owns the item's slots in the arena, and its state."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import numpy as np
from opentelemetry.trace import SpanContext

from encode_server.engine.arena import Arena
from encode_server.engine.region import Slot
from encode_server.wire.embedding import OutgoingRoom, embedding_bytes
from encode_server.wire.modality import Modality
from encode_server.wire.preparers import PreparedItem
from encode_server.wire.ranks import ItemRef, TensorRef


@dataclass
class Work:
    """An amount of work for the ranks, see `models.prepared.Prepared`."""

    patches: int = 0
    pairs: int = 0


@dataclass(eq=False)
class Piece:
    """What goes into a batch: an item, or a part of a large one. `cost` and `pairs`: see `models.prepared.Prepared`.
    `losses`: how often the ranks were lost while they executed the piece; `kills`: how often of these it was alone, and
    somebody outside of the server seemed to have ended or stopped a rank. `failures`: how often a group answered a
    forward of the piece alone with an error."""

    job: Job
    item: ItemRef
    cost: int
    pairs: int
    losses: int = 0
    kills: int = 0
    failures: int = 0


class Job:
    """One item from its room in the arena to its embedding.

    The owner calls `acquire`, submits the job, awaits `finished`, reads the embedding and calls `release`. The batcher
    calls `began` and `ended` for each piece. `release` is the one place where slots go back; while ranks may still read
    or write them, it takes effect when they are done.
    """

    def __init__(
        self,
        arena: Arena,
        modality: Modality,
        deadline: float,
        *,
        client: str = "",
        reserved: bool = False,
        group: int | None = None,
    ) -> None:
        """`deadline`: of `time.monotonic()`. `client`: for fairness. `reserved`: a health probe's, which has room of
        its own in the arena and the next turn in the queue. `group`: the only group of ranks that may encode it."""
        self.modality, self.deadline, self.client, self.reserved = modality, deadline, client, reserved
        self.group = group
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pieces: tuple[Piece, ...] = ()
        self.abandoned = False
        self.nbytes = 0  # of the embedding
        self.queue_s = 0.0  # from the room in the arena to the first batch
        self.forward_s = 0.0  # of its batches, summed
        self.began_at = self.ended_at = 0.0  # of `time.monotonic()`: the first batch, the last
        self.trace: SpanContext | None = None  # of the request, where it is recorded
        self.batches: list[SpanContext] = []  # those that the job was part of
        self._arena = arena
        self._slots: list[Slot] = []
        self._room: tuple[int, int] | None = None
        self._busy: set[Piece] = set()  # the ranks may touch the slots of these
        self._unended: set[Piece] = set()
        self._acquired_at = 0.0

    async def acquire(self, item: PreparedItem, dim: int, dtype: str) -> int:
        """Reserve room for the tensors and the embedding of `item`, lay out its pieces, and return the offset of the
        tensors in bytes. Asked again for as much, the job keeps the room that it has.

        Raises TooLarge when the arena could never hold them.
        """
        room = (item.nbytes, embedding_bytes(item.tokens, dim, dtype))
        if room != self._room:
            self._arena.release(*self._slots)
            self._slots = []
            self._slots = await self._arena.acquire(room, reserved=self.reserved)
            self._room, self.nbytes = room, room[1]
        self._acquired_at = time.monotonic()
        source, target = self._slots[0].offset, self._slots[1].offset
        pieces = []
        for piece in item.pieces:
            inputs = tuple(TensorRef(t.name, t.dtype, t.shape, source + t.offset) for t in piece.tensors)
            output = TensorRef("embedding", dtype, (piece.tokens, dim), target)
            target += embedding_bytes(piece.tokens, dim, dtype)
            pieces.append(Piece(self, ItemRef(inputs, output, piece.cost), piece.cost, piece.pairs))
        self.pieces = tuple(pieces)
        self._unended = set(pieces)
        return source

    def copy_embedding(self, room: OutgoingRoom | None = None) -> memoryview:
        """The embedding's bytes, row-major, little-endian: in `room`, where there is any, else on the heap."""
        there = self._arena.view(self._slots[1].offset, self.nbytes)
        if room is not None and (copied := room.copy(there)) is not None:
            return copied
        return np.frombuffer(there, np.uint8).copy().data

    def release(self) -> None:
        """Give everything back, now or when the ranks are done with it. May be called again."""
        self.abandoned = True
        self._give_back()

    def began(self, piece: Piece) -> None:
        """The piece goes into a batch. It stays busy when the ranks are lost: they may not be gone yet."""
        self._busy.add(piece)
        if not self.queue_s:
            self.began_at = time.monotonic()
            self.queue_s = self.began_at - self._acquired_at

    def ended(self, piece: Piece, error: Exception | None = None, forward_s: float = 0.0) -> None:
        """No rank touches the piece any more: its part of the embedding is written, or the item came to nothing."""
        self._busy.discard(piece)
        self._unended.discard(piece)
        self.forward_s += forward_s
        if error is not None:
            self.fail(error)
        elif not self._unended and not self.finished.done():
            self.ended_at = time.monotonic()
            self.finished.set_result(None)
        self._give_back()

    def fail(self, error: Exception) -> None:
        """The item comes to nothing, and the rest of it is not wanted any more."""
        if not self.finished.done():
            self.finished.set_exception(error)
            self.finished.exception()  # the owner may be gone
        self.release()

    def _give_back(self) -> None:
        if self.abandoned and not self._busy:
            self._arena.release(*self._slots)
            self._slots = []
