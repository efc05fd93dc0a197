"""What one group of ranks has to do: the batches that it executes, and what waits for this group and no other."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from encode_server.pipeline.jobs import Job, Piece
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import Done, EncoderInfo, ItemRef

WAITING = 1  # batches in the ranks' sockets beside those being executed, so that the device never waits for the front


class Group(Protocol):
    """A group of ranks, as the batcher sees it."""

    @property
    def ready(self) -> bool:
        """Whether the group takes part in the work."""

    @property
    def loaded(self) -> bool:
        """Whether forwards can be sent, if only to prove the group."""

    @property
    def info(self) -> EncoderInfo | None:
        """What the ranks loaded; None before they have."""

    async def forward(
        self, modality: Modality, items: tuple[ItemRef, ...], expected_s: float | None = None
    ) -> list[Done]:
        """Run one batch on every rank. Raises GroupLost, once the group's processes are gone."""


@dataclass(eq=False)
class Again:
    """A batch to be sent as it is, alone, so that whatever brings the ranks down again is known. `avoid`: the group
    that failed on the batch; another is preferred."""

    batch: list[Piece]
    avoid: int | None = None


@dataclass
class Sent:
    """A batch in progress. `traffic`: whether it holds more than health probes. `seconds`: what it should take, 0 where
    that is not known. `began`: of `time.monotonic()`, None while the batch waits behind others in the ranks."""

    traffic: bool
    seconds: float
    began: float | None = None


@dataclass(eq=False)
class GroupWork:
    """`index`: of the group. `alone`: the batch in progress must be the only one. `claimed`: what waits until the group
    is idle, and then runs alone. `bound`: jobs that only this group may execute, which is what proves that it can."""

    index: int
    group: Group
    running: dict[asyncio.Task[None], Sent] = field(default_factory=dict)  # in the order sent; see `add`, `remove`
    alone: bool = False
    claimed: Again | None = None
    bound: deque[Job] = field(default_factory=deque)

    @property
    def side_by_side(self) -> int:
        """Batches that the group has in progress, beside those that wait in its sockets."""
        return self.group.info.at_once if self.group.info else 1

    @property
    def has_room(self) -> bool:
        """Whether another batch may be sent now."""
        if self.claimed is not None or self.alone:
            return not self.running
        return len(self.running) < self.side_by_side + WAITING

    @property
    def traffic(self) -> int:
        """Batches in progress that hold more than health probes."""
        return sum(sent.traffic for sent in self.running.values())

    @property
    def seconds(self) -> float:
        """Seconds that the batches in progress still take, added up, as far as costs have been learnt. The time that a
        batch waited in the ranks is none of its own."""
        now = time.monotonic()
        return sum(
            sent.seconds - (0.0 if sent.began is None else min(sent.seconds, now - sent.began))
            for sent in self.running.values()
        )

    def add(self, task: asyncio.Task[None], sent: Sent) -> None:
        """The group was sent a batch; `task` ends with the batch."""
        self.running[task] = sent
        self._note_began()

    def remove(self, task: asyncio.Task[None]) -> None:
        """The batch of `task` has ended."""
        self.running.pop(task, None)
        self._note_began()

    def _note_began(self) -> None:
        """The ranks compute the oldest batches, as many concurrently as they say."""
        computing = self.group.info.computing if self.group.info else 1
        for sent in itertools.islice(self.running.values(), computing):
            if sent.began is None:
                sent.began = time.monotonic()
