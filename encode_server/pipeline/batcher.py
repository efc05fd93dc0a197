"""Builds batches by token budget, keeps the groups of ranks supplied, and sends again what was lost with them.

Nothing waits for a timer: when no batch waits in a group's sockets, what is queued leaves for that group. With several
groups, the one that has the least work is served first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol

from opentelemetry.trace import Span

from encode_server.engine.group import GroupLost
from encode_server.errors import DeadlineExceeded, EncodeFailed, NotReady
from encode_server.pipeline.cost import ForwardCost
from encode_server.pipeline.fair_queue import FairQueue
from encode_server.pipeline.group_work import Again, Group, GroupWork, Sent
from encode_server.pipeline.jobs import Job, Piece
from encode_server.telemetry.metrics import Metrics
from encode_server.telemetry.tracing import Tracing, end_batch
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import Done, EncoderInfo

log = logging.getLogger(__name__)

LARGE = 4  # a batch above this many times `batch_cost` runs alone, on all cores
MAX_LOSSES = 2  # how often a batch may be executing when the ranks are lost before the batch is taken apart
MAX_KILLS = 4  # kills of ranks from outside, as far as can be known, until an item that was alone each time is blamed


class Engine(Protocol):
    """The groups of ranks, as the batcher sees them."""

    @property
    def groups(self) -> Sequence[Group]:
        """Every group, whatever its state."""

    @property
    def info(self) -> EncoderInfo | None:
        """What each group loads; None before one has."""

    @property
    def over(self) -> str | None:
        """Why no group ever will be ready again; None while one may."""

    async def changed(self) -> None:
        """Return at the next change of a group's state."""


class Batcher:
    """Accepts jobs, forwards their pieces in batches, and ends each piece exactly once, in `_end`."""

    def __init__(
        self, engine: Engine, budgets: Mapping[Modality, int], metrics: Metrics, tracing: Tracing | None = None
    ) -> None:
        self._engine, self._metrics, self._tracing = engine, metrics, tracing
        self._budgets = dict(budgets)
        self._costs = {modality: ForwardCost() for modality in budgets}
        self._queue = FairQueue(self._cost)
        self._again: deque[Again] = deque()
        self.works = [GroupWork(index, group) for index, group in enumerate(engine.groups)]
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None  # a bug in handling a batch
        self._closed: str | None = None  # why nothing is forwarded any more

    @property
    def queued(self) -> int:
        """Pieces that wait for a batch."""
        claimed = sum(len(work.claimed.batch) for work in self.works if work.claimed is not None)
        bound = sum(len(job.pieces) for work in self.works for job in work.bound)
        return len(self._queue) + sum(len(again.batch) for again in self._again) + claimed + bound

    @property
    def in_flight(self) -> int:
        """Batches sent to the ranks."""
        return sum(len(work.running) for work in self.works)

    @property
    def costs(self) -> Mapping[Modality, ForwardCost]:
        """What has been learnt of forwards, by modality."""
        return self._costs

    @property
    def backlog_s(self) -> float:
        """Seconds until the ranks have executed what is queued and in flight, as far as costs have been learnt."""
        seconds = sum(work.seconds for work in self.works)
        for modality, work in self._queue.work.items():
            if work.patches:
                seconds += self._costs[modality].seconds(work.patches, work.pairs) or 0.0
        claimed = [work.claimed for work in self.works if work.claimed is not None]
        for again in (*self._again, *claimed):
            seconds += self._seconds(again.batch)
        return seconds / self._concurrent

    @property
    def capacity(self) -> float | None:
        """Patches that the ranks execute in a second, of the modality that costs most; None before that is learnt."""
        rates = [rate for cost in self._costs.values() if (rate := cost.patches_per_s) is not None]
        return min(rates) * self._concurrent if rates else None

    @property
    def _concurrent(self) -> int:
        """Forwards that are computed concurrently, by the groups that are ready."""
        return max(1, len(self._ready())) * (self._engine.info.computing if self._engine.info else 1)

    def budget(self, modality: Modality) -> int:
        """Encoder tokens of one batch, at present."""
        budget, info = self._budgets[modality], self._engine.info
        return min(budget, info.batch_cost) if info and info.batch_cost else budget

    def submit(self, job: Job) -> None:
        """Queue a job; `job.finished` says how it ended."""
        if self._closed is not None:
            job.fail(NotReady(self._closed))
            return
        if job.group is None:
            self._queue.put(job)
        else:
            self.works[job.group].bound.append(job)
        self._wake.set()

    async def run(self) -> None:
        """Build and send batches until cancelled, or until no group is left; what is queued then ends with NotReady."""
        reason = "the batcher failed"
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                self._wake.clear()
                if self._engine.over is not None:
                    reason = f"the encoder is not available: {self._engine.over}"
                    return
                self._supply()
                await self._wake.wait()
                if self._failure is not None:
                    # Ranks may still work on that batch, so its room cannot be given to others: end the server.
                    raise self._failure
        except asyncio.CancelledError:
            reason = "the server is stopping"
            raise
        finally:
            self._closed = reason
            running = [watching, *(task for work in self.works for task in work.running)]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for work in self.works:
                self._withdraw(work, reason)
            for piece in (piece for again in self._again for piece in again.batch):
                self._end(piece, NotReady(reason))
            self._again.clear()
            for job in self._queue.drain():
                job.fail(NotReady(reason))

    async def _watch(self) -> None:
        """Look at the groups whenever the state of one changes."""
        while True:
            self._wake.set()
            await self._engine.changed()

    def _ready(self) -> list[GroupWork]:
        """The groups that take part in the work, those with the least work first."""
        ready = [work for work in self.works if work.group.ready]
        if len(ready) > 1:
            ready.sort(key=lambda work: (work.seconds, len(work.running)))
        return ready

    def _supply(self) -> None:
        """Send what can be sent."""
        for work in self.works:
            if not work.group.loaded:
                self._withdraw(work, "the group that was to encode it is lost")
            while work.bound and work.has_room:
                if self._is_live(job := work.bound.popleft()):
                    self._send(work, list(job.pieces))
        if self._again:
            self._claim()
        while any(self._supply_one(work) for work in self._ready()):
            pass

    def _supply_one(self, work: GroupWork) -> bool:
        """Send the group a batch; whether there was one for it."""
        if not work.has_room or not (batch := self._next_batch(work)):
            return False
        self._send(work, batch)
        return True

    def _withdraw(self, work: GroupWork, reason: str) -> None:
        """Take back what waited for a group that is no more."""
        if work.claimed is not None:
            self._again.appendleft(work.claimed)
            work.claimed = None
        while work.bound:
            work.bound.popleft().fail(NotReady(reason))

    def _claim(self) -> None:
        """Choose a group for each batch that is to be sent again. Every group takes one such batch at a time, as soon
        as the group is idle."""
        for again in list(self._again):
            ready = self._ready()
            may = [work for work in ready if work.index != again.avoid] or ready
            if free := [work for work in may if work.claimed is None]:
                free[0].claimed = again
                self._again.remove(again)

    def _end(self, piece: Piece, error: Exception | None = None, forward_s: float = 0.0) -> None:
        """The one door through which a piece that was in a batch leaves: no rank touches it any more."""
        piece.job.ended(piece, error, forward_s)

    def _send(self, work: GroupWork, batch: list[Piece]) -> None:
        for piece in batch:
            piece.job.began(piece)
        self._metrics.group_batches[str(work.index)].inc()
        task = asyncio.create_task(self._forward(work, batch))
        traffic = not all(piece.job.reserved for piece in batch)
        work.add(task, Sent(traffic, self._seconds(batch)))
        task.add_done_callback(lambda task: self._on_end(work, task))

    def _on_end(self, work: GroupWork, task: asyncio.Task[None]) -> None:
        work.remove(task)
        if not task.cancelled():
            self._failure = self._failure or task.exception()
        self._wake.set()

    def _next_batch(self, work: GroupWork) -> list[Piece]:
        work.alone = False
        while work.claimed is not None:
            again, work.claimed = work.claimed, None
            if batch := self._live_pieces(again.batch):
                work.alone = True
                return batch
            self._claim()
        budgets = {modality: self.budget(modality) for modality in self._budgets}
        batch = self._queue.take(budgets, self._is_live)
        if self._needs_all_cores(batch):
            if work.running:
                work.claimed = Again(batch)
                return []
            work.alone = True
        return batch

    def _live_pieces(self, batch: list[Piece]) -> list[Piece]:
        """What is still wanted of a batch to be sent again."""
        live = [piece for piece in batch if self._is_live(piece.job)]
        for piece in batch:
            if piece not in live:
                self._end(piece, NotReady("its request has ended"))
        return live

    def _needs_all_cores(self, batch: list[Piece]) -> bool:
        """Whether the batch would take too long beside others, which leave each forward one core of many."""
        info = self._engine.info
        return bool(info and info.batch_cost and sum(map(self._cost, batch)) > LARGE * info.batch_cost)

    def _cost(self, piece: Piece) -> int:
        """What the piece takes of a budget."""
        return self._costs[piece.job.modality].of(piece.cost, piece.pairs)

    def _seconds(self, batch: list[Piece]) -> float:
        """How long a forward of the batch should take; 0 before that is learnt."""
        patches, pairs = sum(piece.cost for piece in batch), sum(piece.pairs for piece in batch)
        return self._costs[batch[0].job.modality].seconds(patches, pairs) or 0.0

    def _is_live(self, job: Job) -> bool:
        """Whether the job is to be forwarded; a job whose time is up ends here, one whose caller has gone already
        has."""
        if job.abandoned:
            self._metrics.dropped["gone"].inc()
            return False
        if time.monotonic() >= job.deadline:
            self._metrics.dropped["late"].inc()
            job.fail(DeadlineExceeded("its time was up while it waited for the encoder"))
            return False
        return True

    async def _forward(self, work: GroupWork, batch: list[Piece]) -> None:
        modality = batch[0].job.modality
        patches, pairs = sum(piece.cost for piece in batch), sum(piece.pairs for piece in batch)
        self._metrics.batch_tokens[modality].observe(patches)
        expected_s = self._costs[modality].seconds(patches, pairs)
        span = self._start_span(batch, patches)
        try:
            dones = await work.group.forward(modality, tuple(piece.item for piece in batch), expected_s)
        except GroupLost as lost:
            end_batch(span, str(lost))
            self._replay(work, batch, lost)
        except asyncio.CancelledError:
            end_batch(span, "cancelled")
            for piece in batch:
                self._end(piece, NotReady("the server is stopping"))
            raise
        except Exception:
            for piece in batch:  # its room stays taken: ranks may still work on it
                piece.job.fail(EncodeFailed("an internal error, see the server's log"))
            raise
        else:
            end_batch(span, next((done.error for done in dones if done.error), ""))
            self._settle(work, batch, dones)

    def _start_span(self, batch: list[Piece], patches: int) -> Span | None:
        if self._tracing is None:
            return None
        jobs = list(dict.fromkeys(piece.job for piece in batch if piece.job.trace is not None))
        contexts = [job.trace for job in jobs if job.trace is not None]
        span = self._tracing.start_batch(
            contexts, modality=str(batch[0].job.modality), pieces=len(batch), patches=patches
        )
        if span is not None:
            for job in jobs:
                job.batches.append(span.get_span_context())
        return span

    def _settle(self, work: GroupWork, batch: list[Piece], dones: list[Done]) -> None:
        modality = batch[0].job.modality
        failed = next((done for done in dones if done.error), None)
        if failed is None:
            patches, pairs = sum(piece.cost for piece in batch), sum(piece.pairs for piece in batch)
            self._costs[modality].observe(patches, pairs, dones[0].forward_s)
            for piece in batch:
                self._end(piece, forward_s=dones[0].forward_s)
            return
        log.warning("a batch of %d %s failed: %s", len(batch), modality, failed.error)
        if (
            batch[0].job.group is not None
        ):  # it says how this group is: no other may encode it, no budget follows from it
            for piece in batch:
                self._end(piece, EncodeFailed(f"group {work.index} failed: {failed.error}"))
            return
        if failed.out_of_memory:
            if work.side_by_side > 1 and not work.alone:
                self._requeue(batch)  # a neighbour may have had the memory
                return
            self._lower_budget(batch)
        if len(batch) > 1:
            self._halve(batch, work.index)
        elif not batch[0].failures and len(self._ready()) > 1:
            batch[0].failures += 1
            self._requeue(batch, work.index)  # the fault may be this group's
        else:
            self._end(batch[0], EncodeFailed("the encoder failed on this item"))

    def _replay(self, work: GroupWork, batch: list[Piece], lost: GroupLost) -> None:
        """Send a lost batch again, in halves when the ranks were lost on it repeatedly, or blame its only piece."""
        if batch[0].job.group is not None:  # what was to prove the group has done so
            for piece in batch:
                self._end(piece, NotReady(f"the group was lost: {lost}"))
            return
        self._metrics.replayed.inc(len(batch))
        if lost.suspect:
            for piece in batch:
                piece.losses += 1
                piece.kills += lost.outside and work.alone and len(batch) == 1
        if lost.out_of_memory:
            self._lower_budget(batch)
        repeatedly = lost.out_of_memory or max(piece.losses for piece in batch) >= MAX_LOSSES
        if not lost.suspect or not repeatedly:
            self._requeue(batch, work.index if lost.suspect else None)
        elif len(batch) > 1:
            self._halve(batch, work.index)
        elif self._is_to_blame(work, batch[0], lost):
            why = "the encoder failed on this item" if lost.out_of_memory else "the ranks died on this item, repeatedly"
            self._end(batch[0], EncodeFailed(why))
        else:
            self._requeue(batch, work.index)

    def _is_to_blame(self, work: GroupWork, piece: Piece, lost: GroupLost) -> bool:
        """Whether a piece on which the ranks were lost repeatedly has ended them: only a piece that they executed alone
        is judged, and a kill from outside is not its doing, unless such kills follow it."""
        return lost.out_of_memory or (work.alone and (not lost.outside or piece.kills >= MAX_KILLS))

    def _halve(self, batch: list[Piece], avoid: int) -> None:
        middle = len(batch) // 2
        self._requeue(batch[middle:], avoid)
        self._requeue(batch[:middle], avoid)

    def _requeue(self, batch: list[Piece], avoid: int | None = None) -> None:
        self._again.appendleft(Again(batch, avoid))
        self._wake.set()

    def _lower_budget(self, batch: list[Piece]) -> None:
        modality = batch[0].job.modality
        self._budgets[modality] = max(1, min(self._budgets[modality], sum(map(self._cost, batch)) // 2))
        log.warning("out of memory: %s batches are now at most %d tokens", modality, self._budgets[modality])
