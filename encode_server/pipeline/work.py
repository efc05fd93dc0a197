"""Media items on their way through the engine: their place in the arena, and the pieces of work they are cut into."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from encode_server.engine.arena import ALIGNMENT, Arena, Slot
from encode_server.wire.embedding import embedding_bytes
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import ItemRef, TensorRef

if TYPE_CHECKING:
    import torch

    from encode_server.models.prepared import Prepared


class WorkState(StrEnum):
    """Where a piece of work is."""

    QUEUED = "queued"
    IN_FLIGHT = "in flight"
    ENDED = "ended"


@dataclass(eq=False)
class Work:
    """What goes into a batch: an item, or a piece of a large one. `cost` and `pairs` as `Prepared` has them."""

    placement: Placement
    item: ItemRef
    cost: int
    pairs: int
    state: WorkState = WorkState.QUEUED
    failures: int = 0  # how often the ranks were lost while they executed it

    def start(self) -> None:
        """It goes into a batch. It stays in flight when the ranks are lost: they may not be dead yet."""
        self.state = WorkState.IN_FLIGHT
        self.placement.started()

    def complete(self, forward_s: float) -> None:
        """Its part of the embedding is written."""
        self.state = WorkState.ENDED
        self.placement.work_ended(forward_s)

    def fail(self, error: Exception) -> None:
        """It ends without an embedding, and its item with it."""
        self.state = WorkState.ENDED
        self.placement.work_failed(error)


class Placement:
    """One item in the arena: owner of its slots, for its tensors and for its embedding.

    `finished` ends when all its work has, or when one piece failed. `release` is the one place where the slots go back;
    while a forward is in flight it takes effect when the ranks are done: they still read and write.
    """

    def __init__(
        self,
        arena: Arena,
        modality: Modality,
        deadline: float,
        slots: Sequence[Slot],
        *,
        client: str = "",
        urgent: bool = False,
    ) -> None:
        self.modality, self.deadline, self.client, self.urgent = modality, deadline, client, urgent
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.works: list[Work] = []
        self.abandoned = False
        self.queue_s = 0.0  # from the queueing of the item to its first batch
        self.forward_s = 0.0  # of its batches, summed
        self._arena = arena
        self._input, self._output = slots[0], slots[1]
        self._held = list(slots)
        self._placed_at = time.monotonic()
        self.nbytes = 0  # of the embedding

    def fill(self, pieces: Sequence[Prepared], dim: int, dtype: str) -> None:
        """Copy the pieces' tensors in, and lay out their work. Large copies belong in a worker thread."""
        source, target = self._input.offset, self._output.offset
        for piece in pieces:
            inputs = []
            for name, tensor in piece.tensors.items():
                inputs.append(self._write(name, tensor, source))
                source += _aligned(_nbytes(tensor))
            output = TensorRef("embedding", dtype, (piece.tokens, dim), target)
            target += embedding_bytes(piece.tokens, dim, dtype)
            self.works.append(Work(self, ItemRef(tuple(inputs), output), piece.cost, piece.pairs))
        self.nbytes = target - self._output.offset

    def copy_embedding(self) -> memoryview:
        """The embedding's bytes, row-major, little-endian, on the heap."""
        return np.frombuffer(self._arena.view(self._output.offset, self.nbytes), np.uint8).copy().data

    def release(self) -> None:
        """Give everything back, now or when the ranks are done with it. May be called again."""
        self.abandoned = True
        self._give_back()

    def started(self) -> None:
        """One of its works goes into a batch."""
        if not self.queue_s:
            self.queue_s = time.monotonic() - self._placed_at

    def work_ended(self, forward_s: float) -> None:
        """One of its works is done."""
        self.forward_s += forward_s
        if all(work.state is WorkState.ENDED for work in self.works):
            if self._input in self._held:
                self._held.remove(self._input)
                self._arena.release(self._input)
            if not self.finished.done():
                self.finished.set_result(None)
        self._give_back()

    def work_failed(self, error: Exception) -> None:
        """One of its works came to nothing; the rest is not wanted any more."""
        if not self.finished.done():
            self.finished.set_exception(error)
            self.finished.exception()  # its owner may be gone
        self.release()

    def _give_back(self) -> None:
        if self.abandoned and not any(work.state is WorkState.IN_FLIGHT for work in self.works):
            self._arena.release(*self._held)
            self._held.clear()

    def _write(self, name: str, tensor: torch.Tensor, offset: int) -> TensorRef:
        size = _nbytes(tensor)
        if size:
            source = tensor.contiguous().view(-1).numpy().view(np.uint8)
            np.copyto(np.frombuffer(self._arena.view(offset, size), np.uint8), source)
        return TensorRef(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset)


def room_for(pieces: Sequence[Prepared], dim: int, dtype: str) -> tuple[int, int]:
    """Bytes that the pieces' tensors, and their embedding ([tokens, dim] of `dtype`), take in the arena."""
    inputs = sum(_aligned(_nbytes(tensor)) for piece in pieces for tensor in piece.tensors.values())
    return inputs, sum(embedding_bytes(piece.tokens, dim, dtype) for piece in pieces)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
