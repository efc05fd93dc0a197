"""The loops: closed (so many requests in progress at a time) and open (so many a second, whatever comes back)."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from encode_server.bench.client import LoadClient
from encode_server.bench.report import LoadReport, Result
from encode_server.bench.source import LoadRequest
from encode_server.errors import StartupError


@dataclass(frozen=True)
class Load:
    """How to send. Closed loop of `concurrency`, or with `rate` (requests per second, Poisson) an open one.

    It ends after `seconds` or, closed, `count` requests, whichever is first; requests then in progress are awaited but
    not counted. Results of the first `warmup_s` seconds are not counted either. `most`: requests an open loop has in
    progress at most; those due beyond it wait, and their latency counts from when they were due.
    """

    concurrency: int = 1
    rate: float | None = None
    seconds: float = 10.0
    count: int | None = None
    warmup_s: float = 0.0
    most: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if self.concurrency < 1 or self.seconds <= 0 or (self.rate is not None and self.rate <= 0):
            raise StartupError("a load needs a concurrency, a duration and a rate above zero")


async def run_load(
    client: LoadClient,
    requests: Iterator[LoadRequest],
    load: Load,
    *,
    on_result: Callable[[Result], None] | None = None,
    on_progress: Callable[[float, LoadReport], None] | None = None,
) -> LoadReport:
    """Send `requests` as `load` says and report what came back.

    `on_result` is given every result, those not counted too, on the loop: keep it short. `on_progress` is given the
    share done, 0 to 1, and the report so far, twice a second. Cancelled, it cancels what is in progress.
    """
    return await _Run(client, requests, load, on_result).report(on_progress)


class _Run:
    def __init__(
        self,
        client: LoadClient,
        requests: Iterator[LoadRequest],
        load: Load,
        on_result: Callable[[Result], None] | None,
    ) -> None:
        self._client, self._requests, self._load, self._on_result = client, requests, load, on_result
        self._report = LoadReport()
        self._left = load.count
        self._begin = self._end = 0.0

    async def report(self, on_progress: Callable[[float, LoadReport], None] | None) -> LoadReport:
        load, report = self._load, self._report
        self._begin = time.perf_counter() + load.warmup_s
        self._end = self._begin + load.seconds
        clocks: list[float] = []
        async with asyncio.TaskGroup() as group:
            watch = group.create_task(self._watch(clocks, on_progress))
            async with asyncio.TaskGroup() as senders:
                if load.rate is not None:
                    senders.create_task(self._open(load.rate, senders))
                else:
                    for _ in range(load.concurrency):
                        senders.create_task(self._closed())
            # Before the time is up when the requests have run out.
            stopped = min(time.perf_counter(), self._end)
            watch.cancel()
        if len(clocks) < 2:
            clocks.append(time.process_time())
        report.seconds = max(1e-9, stopped - self._begin)
        report.cpu_s = clocks[-1] - clocks[0]
        return report

    async def _watch(self, clocks: list[float], on_progress: Callable[[float, LoadReport], None] | None) -> None:
        """Note the processor time when counting begins and ends, and show progress."""
        await asyncio.sleep(self._begin - time.perf_counter())
        clocks.append(time.process_time())
        while (left := self._end - time.perf_counter()) > 0:
            if on_progress is not None:
                done = 1 - left / self._load.seconds
                if self._load.count:
                    done = max(done, 1 - (self._left or 0) / self._load.count)
                on_progress(done, self._report)
            await asyncio.sleep(min(0.5, left))
        clocks.append(time.process_time())

    def _next(self) -> LoadRequest | None:
        """The next request, None when it is time to end."""
        if time.perf_counter() >= self._end or self._left == 0:
            return None
        if self._left is not None:
            self._left -= 1
        return next(self._requests, None)

    async def _closed(self) -> None:
        while (request := self._next()) is not None:
            await self._send(request, time.perf_counter())

    async def _open(self, rate: float, senders: asyncio.TaskGroup) -> None:
        gaps = random.Random(self._load.seed)
        room = asyncio.Semaphore(self._load.most)
        due = time.perf_counter()

        async def send(request: LoadRequest, due: float) -> None:
            try:
                await self._send(request, due)
            finally:
                room.release()

        while (request := self._next()) is not None:
            await room.acquire()
            senders.create_task(send(request, due))
            due += gaps.expovariate(rate)
            if due >= self._end:
                return
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)

    async def _send(self, request: LoadRequest, due: float) -> None:
        response, _ = await self._client.send(request)
        now = time.perf_counter()
        result = Result(request, response, now - due)
        # A request counts where it ends: so a closed loop's rate is right however long each takes.
        if self._begin <= now < self._end:
            self._report.add(result, now)
        else:
            self._report.skipped += 1
        if self._on_result is not None:
            self._on_result(result)
        if response.status == 0:
            await asyncio.sleep(0.05)  # a server that is gone must not be asked a thousand times a second
