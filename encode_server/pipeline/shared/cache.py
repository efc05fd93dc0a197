"""The shared cache, as the pipeline sees it: a look-up that costs bounded time and never an error, and a write that
nobody waits for.

Threads of its own do everything: the loop is told the outcome. What is asked while the lines are busy goes together
with the next free one, in one round trip.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from encode_server.errors import first_line
from encode_server.pipeline.cache import CacheKey
from encode_server.pipeline.shared.breaker import Breaker
from encode_server.pipeline.shared.line import Line, Refused, Store, Unreachable
from encode_server.pipeline.shared.values import Garbled, Kind, key_of, pack, unpack
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.embedding import EncodedItem

log = logging.getLogger(__name__)

READERS = 2
READ_TOGETHER = 32  # look-ups in one round trip
BYTES_TOGETHER = 16 << 20  # that these should bring: a look-up waits for those before it
SIZE_WEIGHT = 0.1  # of one value in the mean of their sizes
WRITE_TOGETHER = 16
WRITE_S = 2.0  # longest time of a round trip that writes
QUEUED_BYTES = 128 << 20  # embeddings that wait to be written; beyond it new ones are not
HEAD_BYTES = 64 << 10  # of a value beside the embedding: a long video has a time for each of its frames


@dataclass(frozen=True)
class SharedLimits:
    """`timeout_s`: longest time of a look-up. `max_bytes`: of an embedding that is looked up or kept."""

    timeout_s: float
    max_bytes: int


@dataclass(eq=False)
class _Look:
    """`found`: an item, or in one word why there is none; see `telemetry.metrics.SHARED_LOOK_UPS`."""

    key: str
    kind: Kind
    deadline: float
    sent: bool = False
    found: asyncio.Future[EncodedItem | str] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def answer(self, found: EncodedItem | str) -> None:
        if not self.found.done():
            self.found.set_result(found)


@dataclass(frozen=True)
class _Write:
    key: str
    kind: Kind
    item: EncodedItem


class SharedCache:
    """Owner of the lines and their threads. Make it on the loop; `close` it there. Until `fingerprint` is set nothing
    is looked up or written."""

    def __init__(self, store: Store, limits: SharedLimits, metrics: Metrics) -> None:
        self.fingerprint: str | None = None
        self.max_queued_bytes = QUEUED_BYTES
        self.queued_bytes = 0
        self._limits, self._metrics = limits, metrics
        self._loop = asyncio.get_running_loop()
        self._lines = [store.line() for _ in range(READERS)]
        self._free = list(self._lines)
        self._writer = store.line()
        self._writing = False
        self._wanted: deque[_Look] = deque()
        self._looks: set[_Look] = set()
        self._queue: deque[_Write] = deque()
        self._reading = Breaker(partial(self._opened, "look-ups"))
        self._storing = Breaker(partial(self._opened, "writes"))
        self._pool = ThreadPoolExecutor(READERS + 1, "shared-cache")
        self._size = 0.0  # of a value that was found, on average
        self._answered_at = 0.0  # of `time.monotonic()`
        self._why = ""  # of the last failure, for the log
        self._closed = False

    @property
    def asking(self) -> bool:
        """Whether look-ups go to the cache; False while it fails."""
        return self._reading.closed

    @property
    def writing(self) -> bool:
        """The same of writes."""
        return self._storing.closed

    async def get(self, key: CacheKey, dtype: str, dim: int) -> EncodedItem | None:
        """The embedding for `key`, or None, after `timeout_s` at the latest. Raises nothing but CancelledError."""
        if self.fingerprint is None or self._closed or not self._reading.admits():
            self._metrics.shared_look_ups["skipped"].inc()
            return None
        kind = Kind(self.fingerprint, dtype, dim)
        began = time.monotonic()
        look = _Look(key_of(key, kind), kind, began + self._limits.timeout_s)
        self._looks.add(look)
        self._wanted.append(look)
        self._feed()
        found: EncodedItem | str | None = None
        try:
            await asyncio.wait((look.found,), timeout=self._limits.timeout_s)
            found = look.found.result() if look.found.done() else self._too_late(look, began)
        finally:
            self._looks.discard(look)
            look.found.cancel()
            self._learn(found)
        self._metrics.shared_seconds["get"].observe(time.monotonic() - began)
        if isinstance(found, str):
            self._metrics.shared_look_ups[found].inc()
            return None
        self._metrics.shared_look_ups["hit"].inc()
        self._metrics.shared_bytes["read"].inc(found.data.nbytes)
        self._size += SIZE_WEIGHT * (found.data.nbytes - self._size)
        return found

    def put(self, key: CacheKey, item: EncodedItem, dtype: str, dim: int) -> None:
        """Have an embedding written when there is time; without a word, none where that is not possible."""
        size, outcome = item.data.nbytes, ""
        if size > self._limits.max_bytes:
            outcome = "too_large"
        elif self.queued_bytes + size > self.max_queued_bytes:
            outcome = "dropped"
        elif self.fingerprint is None or self._closed or not self._storing.admits():
            outcome = "skipped"
        if self.fingerprint is None or outcome:
            self._metrics.shared_writes[outcome].inc()
            return
        kind = Kind(self.fingerprint, dtype, dim)
        self._queue.append(_Write(key_of(key, kind), kind, item))
        self.queued_bytes += size
        self._flush()

    def close(self) -> None:
        """Ask and write no more; what is going on ends immediately."""
        self._closed = True
        self._drop_writes("skipped")
        for look in self._looks:
            look.answer("skipped")
        for line in (*self._lines, self._writer):
            line.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _too_late(self, look: _Look, began: float) -> str:
        """Whether the cache is to blame: not where it only answered others first."""
        return "timeout" if look.sent or self._answered_at < began else "late"

    def _learn(self, found: EncodedItem | str | None) -> None:
        if isinstance(found, EncodedItem) or found == "miss":
            self._reading.succeeded()
            self._answered_at = time.monotonic()
        elif found in (None, "skipped", "late"):
            self._reading.abandoned()
        else:
            self._reading.failed()

    def _opened(self, what: str) -> None:
        """It fails again and again. Nobody who waits for an answer now waits any longer."""
        log.warning("the shared cache fails: no %s for a while (%s)", what, self._why or "no answer in time")
        if not self._reading.closed:
            for look in self._looks:
                look.answer("skipped")
        if not self._storing.closed:
            self._drop_writes("skipped")

    def _drop_writes(self, outcome: str) -> None:
        for write in self._queue:
            self.queued_bytes -= write.item.data.nbytes
            self._metrics.shared_writes[outcome].inc()
        self._queue.clear()

    def _feed(self) -> None:
        """Send what is wanted over the lines that are free."""
        while self._free and self._wanted:
            batch: list[_Look] = []
            most = min(READ_TOGETHER, max(1, int(BYTES_TOGETHER / max(self._size, 1))))
            while self._wanted and len(batch) < most:
                look = self._wanted.popleft()
                if not look.found.done():
                    look.sent = True
                    batch.append(look)
            if batch:
                line = self._free.pop()
                self._pool.submit(self._read, line, batch)

    def _read(self, line: Line, batch: list[_Look]) -> None:
        """Look up in a thread."""
        left = deque(batch)
        outcome, why = "unreachable", ""
        try:
            limit = self._limits.max_bytes + HEAD_BYTES
            for value in line.fetch([look.key for look in batch], limit, max(look.deadline for look in batch)):
                look = left[0]
                self._tell(look.answer, _found(look, value))
                left.popleft()
        except Exception as error:
            outcome, why = _failure(error)
        self._tell(self._has_read, line, left, outcome, why)

    def _has_read(self, line: Line, left: deque[_Look], outcome: str, why: str) -> None:
        if left:
            self._why = why
        for look in left:
            look.answer(outcome)
        self._free.append(line)
        if not self._closed:
            self._feed()

    def _flush(self) -> None:
        """Write what waits, unless that is being done."""
        if self._writing or not self._queue:
            return
        self._writing = True
        batch = [self._queue.popleft() for _ in range(min(WRITE_TOGETHER, len(self._queue)))]
        self._pool.submit(self._write, batch, time.monotonic())

    def _write(self, batch: list[_Write], began: float) -> None:
        """Write in a thread."""
        outcomes: list[str] = []
        outcome, why = "unreachable", ""
        try:
            entries = [(write.key, pack(write.key, write.item, write.kind)) for write in batch]
            for refused in self._writer.store(entries, began + WRITE_S):
                outcomes.append("stored" if refused is None else "full" if refused.full else "refused")
                why = why if refused is None else first_line(refused)
        except Exception as error:
            outcome, why = _failure(error)
        outcomes += [outcome] * (len(batch) - len(outcomes))
        self._tell(self._has_written, batch, outcomes, time.monotonic() - began, why)

    def _has_written(self, batch: list[_Write], outcomes: list[str], seconds: float, why: str) -> None:
        self._writing = False
        self._why = why or self._why
        self._metrics.shared_seconds["put"].observe(seconds)
        for write, outcome in zip(batch, outcomes, strict=True):
            size = write.item.data.nbytes
            self.queued_bytes -= size
            self._metrics.shared_writes[outcome].inc()
            if outcome == "stored":
                self._metrics.shared_bytes["written"].inc(size)
                self._storing.succeeded()
            else:
                self._storing.failed()
        if not self._closed:
            self._flush()

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *arguments)


def _failure(error: Exception) -> tuple[str, str]:
    """What the metrics call a failed exchange, and why the exchange failed."""
    match error:
        case TimeoutError():
            outcome = "timeout"
        case Refused():
            outcome = "refused"
        case _:
            outcome = "unreachable"
            if not isinstance(error, Unreachable):
                log.error("an exchange with the shared cache failed", exc_info=error)
    return outcome, first_line(error)


def _found(look: _Look, value: memoryview | None) -> EncodedItem | str:
    if value is None:
        return "miss"
    try:
        return unpack(look.key, value, look.kind)
    except Garbled:
        return "garbled"
