"""Builds batches by token budget, keeps the ranks supplied, and sends again what was lost with them.

Nothing waits for a timer: when no batch waits in the ranks' sockets, what is queued leaves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from opentelemetry.trace import Span

from encode_server.engine.group import GroupLost
from encode_server.errors import DeadlineExceeded, EncodeFailed, NotReady
from encode_server.pipeline.cost import ForwardCost
from encode_server.pipeline.fair_queue import FairQueue
from encode_server.pipeline.jobs import Job, Piece
from encode_server.telemetry.metrics import Metrics
from encode_server.telemetry.tracing import Tracing, end_batch
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import Done, EncoderInfo, ItemRef

log = logging.getLogger(__name__)

WAITING = 1  # batches in the ranks' sockets beside those being executed, so that the device never waits for the front
LARGE = 4  # a batch above this many times `batch_cost` runs alone, on all cores
MAX_LOSSES = 2  # how often a batch may be executing when the ranks are lost before the batch is taken apart
MAX_KILLS = 4  # kills of ranks from outside, as far as can be known, until an item that was alone each time is blamed


class Engine(Protocol):
    """The ranks, as the batcher sees them."""

    @property
    def ready(self) -> bool:
        """Whether forwards can be sent."""

    @property
    def info(self) -> EncoderInfo | None:
        """What the ranks loaded; None before they have."""

    async def wait_ready(self) -> EncoderInfo:
        """Return once forwards can be sent. Raises GroupLost when they never will be again."""

    async def forward(
        self, modality: Modality, items: tuple[ItemRef, ...], expected_s: float | None = None
    ) -> list[Done]:
        """Run one batch on every rank. Raises GroupLost."""


class Batcher:
    """Accepts jobs, forwards their pieces in batches, and ends each piece exactly once, in `_end`."""

    def __init__(
        self, engine: Engine, budgets: Mapping[Modality, int], metrics: Metrics, tracing: Tracing | None = None
    ) -> None:
        self._engine, self._metrics, self._tracing = engine, metrics, tracing
        self._budgets = dict(budgets)
        self._costs = {modality: ForwardCost() for modality in budgets}
        self._queue = FairQueue(self._cost)
        self._retries: deque[list[Piece]] = deque()  # batches to send as they are, each alone
        self._alone = False  # the batch in flight must be the only one
        self._wake = asyncio.Event()
        self._running: dict[asyncio.Task[None], bool] = {}  # whether a batch holds more than a health probe
        self._expected: dict[asyncio.Task[None], tuple[float, float]] = {}  # when a batch was sent, seconds it takes
        self._failure: BaseException | None = None  # a bug in handling a batch
        self._closed: str | None = None  # why nothing is forwarded any more

    @property
    def queued(self) -> int:
        """Pieces that wait for a batch."""
        return len(self._queue) + sum(map(len, self._retries))

    @property
    def in_flight(self) -> int:
        """Batches sent to the ranks."""
        return len(self._running)

    @property
    def traffic_in_flight(self) -> int:
        """Batches sent to the ranks that hold more than a health probe."""
        return sum(self._running.values())

    @property
    def costs(self) -> Mapping[Modality, ForwardCost]:
        """What has been learnt of forwards, by modality."""
        return self._costs

    @property
    def backlog_s(self) -> float:
        """Seconds until the ranks have executed what is queued and in flight, as far as costs have been learnt."""
        seconds = sum(expected for _, expected in self._expected.values())
        if self._expected:
            sent_at, expected = next(iter(self._expected.values()))
            seconds -= min(expected, time.monotonic() - sent_at)
        for modality, work in self._queue.work.items():
            if work.patches:
                seconds += self._costs[modality].seconds(work.patches, work.pairs) or 0.0
        for batch in self._retries:
            seconds += self._seconds(batch)
        return seconds / self._side_by_side

    @property
    def capacity(self) -> float | None:
        """Patches that the ranks execute in a second, of the modality that costs most; None before that is learnt."""
        rates = [rate for cost in self._costs.values() if (rate := cost.patches_per_s) is not None]
        return min(rates) * self._side_by_side if rates else None

    def budget(self, modality: Modality) -> int:
        """Encoder tokens of one batch, at present."""
        budget, info = self._budgets[modality], self._engine.info
        return min(budget, info.batch_cost) if info and info.batch_cost else budget

    def submit(self, job: Job) -> None:
        """Queue a job; `job.finished` says how it ended."""
        if self._closed is not None:
            job.fail(NotReady(self._closed))
            return
        self._queue.put(job)
        self._wake.set()

    async def run(self) -> None:
        """Build and send batches until cancelled; what is queued then ends with NotReady."""
        reason = "the batcher failed"
        try:
            while True:
                self._wake.clear()
                await self._engine.wait_ready()
                while self._engine.ready and self._has_room() and (batch := self._next_batch()):
                    self._send(batch)
                await self._wake.wait()
                if self._failure is not None:
                    # Ranks may still work on that batch, so its room cannot be given to others: end the server.
                    raise self._failure
        except GroupLost as lost:
            reason = f"the encoder is not available: {lost}"
        except asyncio.CancelledError:
            reason = "the server is stopping"
            raise
        finally:
            self._closed = reason
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            for piece in (piece for batch in self._retries for piece in batch):
                self._end(piece, NotReady(reason))
            self._retries.clear()
            for job in self._queue.drain():
                job.fail(NotReady(reason))

    def _end(self, piece: Piece, error: Exception | None = None, forward_s: float = 0.0) -> None:
        """The one door through which a piece that was in a batch leaves: no rank touches it any more."""
        piece.job.ended(piece, error, forward_s)

    def _send(self, batch: list[Piece]) -> None:
        for piece in batch:
            piece.job.began(piece)
        task = asyncio.create_task(self._forward(batch))
        self._running[task] = not all(piece.job.reserved for piece in batch)
        self._expected[task] = time.monotonic(), self._seconds(batch)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        if not task.cancelled():
            self._failure = self._failure or task.exception()
        self._expected.pop(task, None)
        self._wake.set()

    @property
    def _side_by_side(self) -> int:
        return self._engine.info.at_once if self._engine.info else 1

    def _has_room(self) -> bool:
        # What is sent again runs alone, so that whatever brings the ranks down again is known.
        if self._retries or self._alone:
            return not self._running
        return len(self._running) < self._side_by_side + WAITING

    def _next_batch(self) -> list[Piece]:
        self._alone = False
        while self._retries:
            if batch := self._live_pieces(self._retries.popleft()):
                self._alone = True
                return batch
        budgets = {modality: self.budget(modality) for modality in self._budgets}
        batch = self._queue.take(budgets, self._is_live)
        if self._needs_all_cores(batch):
            if self._running:
                self._requeue(batch)
                return []
            self._alone = True
        return batch

    def _live_pieces(self, batch: list[Piece]) -> list[Piece]:
        """What is still wanted of a batch to be sent again; the ranks that may have touched the rest are gone."""
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

    async def _forward(self, batch: list[Piece]) -> None:
        modality = batch[0].job.modality
        patches, pairs = sum(piece.cost for piece in batch), sum(piece.pairs for piece in batch)
        self._metrics.batch_tokens[modality].observe(patches)
        expected_s = self._costs[modality].seconds(patches, pairs)
        span = self._start_span(batch, patches)
        try:
            dones = await self._engine.forward(modality, tuple(piece.item for piece in batch), expected_s)
        except GroupLost as lost:
            end_batch(span, str(lost))
            self._replay(batch, lost)
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
            self._settle(batch, dones)

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

    def _settle(self, batch: list[Piece], dones: list[Done]) -> None:
        modality = batch[0].job.modality
        failed = next((done for done in dones if done.error), None)
        if failed is None:
            patches, pairs = sum(piece.cost for piece in batch), sum(piece.pairs for piece in batch)
            self._costs[modality].observe(patches, pairs, dones[0].forward_s)
            for piece in batch:
                self._end(piece, forward_s=dones[0].forward_s)
            return
        log.warning("a batch of %d %s failed: %s", len(batch), modality, failed.error)
        if failed.out_of_memory:
            if self._side_by_side > 1 and not self._alone:
                self._requeue(batch)  # a neighbour may have had the memory
                return
            self._lower_budget(batch)
        if len(batch) > 1:
            self._halve(batch)
        else:
            self._end(batch[0], EncodeFailed("the encoder failed on this item"))

    def _replay(self, batch: list[Piece], lost: GroupLost) -> None:
        """Send a lost batch again, in halves when the ranks were lost on it repeatedly, or blame its only piece."""
        self._metrics.replayed.inc(len(batch))
        if lost.suspect:
            for piece in batch:
                piece.losses += 1
                piece.kills += lost.outside and self._alone and len(batch) == 1
        if lost.out_of_memory:
            self._lower_budget(batch)
        repeatedly = lost.out_of_memory or max(piece.losses for piece in batch) >= MAX_LOSSES
        if not lost.suspect or not repeatedly:
            self._requeue(batch)
        elif len(batch) > 1:
            self._halve(batch)
        else:
            if self._is_to_blame(batch[0], lost):
                # Its slots go back when it is taken from the retries: by then the ranks that may write there are gone.
                known = "the encoder failed on this item"
                why = known if lost.out_of_memory else "the ranks died on this item, repeatedly"
                batch[0].job.fail(EncodeFailed(why))
            self._requeue(batch)

    def _is_to_blame(self, piece: Piece, lost: GroupLost) -> bool:
        """Whether a piece on which the ranks were lost repeatedly has ended them: only a piece that they executed alone
        is judged, and a kill from outside is not its doing, unless such kills follow it."""
        return lost.out_of_memory or (self._alone and (not lost.outside or piece.kills >= MAX_KILLS))

    def _halve(self, batch: list[Piece]) -> None:
        middle = len(batch) // 2
        self._requeue(batch[middle:])
        self._requeue(batch[:middle])

    def _requeue(self, batch: list[Piece]) -> None:
        # Sent when the engine is ready again, so after the lost ranks are gone: see Supervisor.run.
        self._retries.appendleft(batch)
        self._wake.set()

    def _lower_budget(self, batch: list[Piece]) -> None:
        modality = batch[0].job.modality
        self._budgets[modality] = max(1, min(self._budgets[modality], sum(map(self._cost, batch)) // 2))
        log.warning("out of memory: %s batches are now at most %d tokens", modality, self._budgets[modality])
