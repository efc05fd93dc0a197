"""One media item on its way through the engine, and the owner of its arena slots."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from encode_server.engine.arena import ALIGNMENT, Arena, Slot
from encode_server.engine.messages import ItemRef, TensorRef
from encode_server.modality import Modality

if TYPE_CHECKING:
    from encode_server.models.prepared import Prepared

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class WorkState(StrEnum):
    """Where an item is between its preprocessing and the release of its slots."""

    QUEUED = "queued"
    IN_FLIGHT = "in flight"
    DONE = "done"
    RELEASED = "released"


@dataclass(eq=False)
class Work:
    """An item whose tensors lie in the arena. `release` is the one place where its slots go back.

    A release while a forward is in flight takes effect when the ranks are done with it: they still read and write.
    An item whose ranks were lost stays in flight until it is sent to others: the old ones may not be dead yet.
    """

    arena: Arena
    modality: Modality
    cost: int
    deadline: float  # of time.monotonic()
    item: ItemRef
    input_slot: Slot | None
    output_slot: Slot | None
    urgent: bool = False
    failures: int = 0
    queued_at: float = field(default_factory=time.monotonic)
    state: WorkState = WorkState.QUEUED
    abandoned: bool = False
    finished: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    queue_s: float = 0.0
    forward_s: float = 0.0

    def start(self) -> None:
        """It goes into a batch."""
        self.state = WorkState.IN_FLIGHT
        self.queue_s = time.monotonic() - self.queued_at

    def complete(self, forward_s: float) -> None:
        """The embedding lies in the output slot; the inputs are not needed any more."""
        self.forward_s = forward_s
        self._end()
        if not self.finished.done():
            self.finished.set_result(None)

    def fail(self, error: Exception) -> None:
        """It ends without an embedding."""
        self._end()
        if not self.finished.done():
            self.finished.set_exception(error)
            self.finished.exception()  # its owner may be gone
        self.release()

    def embedding(self) -> memoryview:
        """The embedding's bytes in the arena, row-major, little-endian; valid until `release`."""
        output = self.item.output
        return self.arena.view(output.offset, math.prod(output.shape) * DTYPE_BYTES[output.dtype])

    def release(self) -> None:
        """Give everything back. May be called again, and in any state."""
        if self.state is WorkState.IN_FLIGHT:
            self.abandoned = True
            return
        self.state = WorkState.RELEASED
        self._give_input()
        if self.output_slot is not None:
            self.arena.release(self.output_slot)
            self.output_slot = None

    def _end(self) -> None:
        self.state = WorkState.DONE
        self._give_input()
        if self.abandoned:
            self.release()

    def _give_input(self) -> None:
        if self.input_slot is not None:
            self.arena.release(self.input_slot)
            self.input_slot = None


def layout(prepared: Prepared, dim: int, dtype: str) -> tuple[int, int]:
    """Bytes that the item's tensors and its embedding ([tokens, dim] of `dtype`) take in the arena."""
    inputs = sum(_aligned(t.numel() * t.element_size()) for t in prepared.tensors.values())
    return inputs, prepared.tokens * dim * DTYPE_BYTES[dtype]


def write_inputs(arena: Arena, slot: Slot, prepared: Prepared) -> tuple[TensorRef, ...]:
    """Copy the tensors into the slot (in a worker thread: large copies) and say where they are."""
    refs = []
    offset = slot.offset
    for name, tensor in prepared.tensors.items():
        size = tensor.numel() * tensor.element_size()
        if size:
            source = tensor.contiguous().view(-1).numpy().view(np.uint8)
            np.copyto(np.frombuffer(arena.view(offset, size), np.uint8), source)
        refs.append(TensorRef(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset))
        offset += _aligned(size)
    return tuple(refs)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
