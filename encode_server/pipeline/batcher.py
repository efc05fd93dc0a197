"""Builds batches by token budget, keeps the ranks supplied, and sends again what was lost with them.

Nothing waits for a timer: when no batch waits in the ranks' sockets, what is queued leaves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping

from encode_server.engine.group import GroupLost
from encode_server.engine.supervisor import Supervisor
from encode_server.errors import DeadlineExceeded, EncodeFailed, NotReady
from encode_server.pipeline.cost import ForwardCost
from encode_server.pipeline.fair_queue import FairQueue
from encode_server.pipeline.work import Placement, Work
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import Done

log = logging.getLogger(__name__)

WAITING = 1  # batches in the ranks' sockets beside those being executed, so that the device never waits for the front
LARGE = 4  # times the cost of the batches that ranks execute side by side: beyond it one goes alone
MAX_FAILURES = 2  # how often a batch may be executing when the ranks are lost before it is taken apart


class Batcher:
    """Accepts items, forwards them in batches, and ends each exactly once."""

    def __init__(self, engine: Supervisor, budgets: Mapping[Modality, int], metrics: Metrics) -> None:
        self._engine, self._metrics = engine, metrics
        self._budgets = dict(budgets)
        self._costs = {modality: ForwardCost() for modality in budgets}
        self._queue = FairQueue(self._cost)
        self._retries: deque[list[Work]] = deque()  # batches to send as they are, each alone
        self._alone = False  # a batch of these is in flight
        self._wake = asyncio.Event()
        self._running: dict[asyncio.Task[None], bool] = {}  # whether a batch holds more than a health probe
        self._closed: str | None = None  # why nothing is forwarded any more

    @property
    def queued(self) -> int:
        """Pieces of work waiting for a batch."""
        return len(self._queue) + sum(map(len, self._retries))

    @property
    def in_flight(self) -> int:
        """Batches sent to the ranks."""
        return len(self._running)

    @property
    def traffic_in_flight(self) -> int:
        """Batches sent to the ranks that hold more than a health probe."""
        return sum(self._running.values())

    def budget(self, modality: Modality) -> int:
        """Encoder tokens of one batch, at present."""
        budget, info = self._budgets[modality], self._engine.info
        return min(budget, info.batch_cost) if info and info.batch_cost else budget

    def submit(self, placement: Placement) -> None:
        """Queue an item; `placement.finished` says how it ended."""
        if self._closed is not None:
            placement.work_failed(NotReady(self._closed))
            return
        self._queue.put(placement)
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
            for work in (work for batch in self._retries for work in batch):
                work.fail(NotReady(reason))
            for placement in self._queue.drain():
                placement.work_failed(NotReady(reason))
            self._retries.clear()

    def _send(self, batch: list[Work]) -> None:
        for work in batch:
            work.start()
        task = asyncio.create_task(self._forward(batch))
        self._running[task] = not all(work.placement.urgent for work in batch)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        self._wake.set()

    @property
    def _at_once(self) -> int:
        return self._engine.info.at_once if self._engine.info else 1

    def _has_room(self) -> bool:
        # What is sent again runs alone, so that whoever brings the ranks down again is known.
        if self._retries or self._alone:
            return not self._running
        return len(self._running) < self._at_once + WAITING

    def _next_batch(self) -> list[Work]:
        self._alone = False
        while self._retries:
            batch = self._retries.popleft()
            for work in batch:
                self._wanted(work.placement)
            for work in (work for work in batch if work.placement.abandoned):
                work.fail(NotReady("its request has ended"))
            if batch := [work for work in batch if not work.placement.abandoned]:
                self._alone = True
                return batch
        batch = self._queue.take({modality: self.budget(modality) for modality in self._budgets}, self._wanted)
        if self._needs_all_cores(batch):
            if self._running:
                self._again(batch)
                return []
            self._alone = True
        return batch

    def _needs_all_cores(self, batch: list[Work]) -> bool:
        """Whether it would take too long beside others, which leave each forward one core of many."""
        info = self._engine.info
        return bool(info and info.batch_cost and sum(map(self._cost, batch)) > LARGE * info.batch_cost)

    def _cost(self, work: Work) -> int:
        """What it takes of a budget."""
        return self._costs[work.placement.modality].of(work.cost, work.pairs)

    def _wanted(self, placement: Placement) -> bool:
        """Whether to forward it still; one whose caller has gone or whose time is up ends here."""
        if placement.abandoned:
            self._metrics.dropped.labels("gone").inc()
            return False
        if time.monotonic() >= placement.deadline:
            self._metrics.dropped.labels("late").inc()
            placement.work_failed(DeadlineExceeded("its time was up while it waited for the encoder"))
            return False
        return True

    async def _forward(self, batch: list[Work]) -> None:
        modality = batch[0].placement.modality
        self._metrics.batch_tokens.labels(modality).observe(sum(work.cost for work in batch))
        try:
            dones = await self._engine.forward(modality, tuple(work.item for work in batch))
        except GroupLost as lost:
            self._replay(batch, lost)
        except asyncio.CancelledError:
            for work in batch:
                work.fail(NotReady("the server is stopping"))
            raise
        else:
            self._settle(batch, dones)

    def _settle(self, batch: list[Work], dones: list[Done]) -> None:
        failed = next((done for done in dones if done.error), None)
        if failed is None:
            patches, pairs = sum(work.cost for work in batch), sum(work.pairs for work in batch)
            self._costs[batch[0].placement.modality].observe(patches, pairs, dones[0].forward_s)
            for work in batch:
                work.complete(dones[0].forward_s)
            return
        log.warning("a batch of %d %s failed: %s", len(batch), batch[0].placement.modality, failed.error)
        if failed.out_of_memory:
            if self._at_once > 1 and not self._alone:
                self._again(batch)  # a neighbour may have had the memory
                return
            self._lower_budget(batch)
        if len(batch) > 1:
            self._halve(batch)
        else:
            batch[0].fail(EncodeFailed("the encoder failed on this item"))

    def _replay(self, batch: list[Work], lost: GroupLost) -> None:
        self._metrics.replayed.inc(len(batch))
        if lost.suspect:
            for work in batch:
                work.failures += 1
        if lost.out_of_memory:
            self._lower_budget(batch)
        elif not lost.suspect or max(work.failures for work in batch) < MAX_FAILURES:
            self._again(batch)
            return
        if len(batch) > 1:
            self._halve(batch)
        else:
            # Its slots go back when it is taken from the retries: by then the ranks that may write there are gone.
            why = "the encoder failed on this item" if lost.out_of_memory else "the ranks died on this item, repeatedly"
            batch[0].placement.work_failed(EncodeFailed(why))
            self._again(batch)

    def _halve(self, batch: list[Work]) -> None:
        middle = len(batch) // 2
        self._again(batch[middle:])
        self._again(batch[:middle])

    def _again(self, batch: list[Work]) -> None:
        # Sent when the engine is ready again, so after the lost ranks have been reaped: see Supervisor.run.
        self._retries.appendleft(batch)
        self._wake.set()

    def _lower_budget(self, batch: list[Work]) -> None:
        modality = batch[0].placement.modality
        self._budgets[modality] = max(1, min(self._budgets[modality], sum(map(self._cost, batch)) // 2))
        log.warning("out of memory: %s batches are now at most %d tokens", modality, self._budgets[modality])
