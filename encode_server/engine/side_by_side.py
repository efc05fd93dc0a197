"""Several concurrent forwards, each on a thread of its own."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock


class SideBySide:
    """Runs `count` jobs concurrently; those that run share the `cores`.

    On a CPU, a job per core: threads that share one matrix product wait for each other at its end, dozens of times per
    layer, so whoever takes one core for a moment holds up all of them. Side by side they need not: on 2 cores 1.3 times
    the throughput. A job that is alone has as many cores as it is worth.

    On a GPU, with two jobs: one is launched while the other computes (`engine.lane`).
    """

    def __init__(self, count: int, cores: int) -> None:
        self._count, self._cores = count, cores
        self._lock = Lock()
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        # Jobs that come one at a time all run on the first thread: OpenMP keeps helpers for each thread that ever had
        # more than one core, and with more of them than cores none of them waits actively any more.
        self._free = list(range(count))
        self._threads = [ThreadPoolExecutor(1, "forward", initializer=self._begin) for _ in range(count)]

    def submit(self, job: Callable[[], None], most_cores: int | None = None) -> None:
        """Run `job`, which must not raise, when a thread is free. Jobs start in the order of their submission.
        `most_cores`: more would not make it faster; None: all would."""
        most = self._cores if most_cores is None else most_cores
        with self._lock:
            if not self._free:
                self._waiting.append((job, most))
                return
            thread = heapq.heappop(self._free)
        self._threads[thread].submit(self._run, thread, job, most)

    def close(self) -> None:
        """Wait for the jobs that run, and drop the others."""
        with self._lock:
            self._waiting.clear()
        for thread in self._threads:
            thread.shutdown()

    def _run(self, thread: int, job: Callable[[], None], most: int) -> None:
        import torch

        while True:
            jobs = self._count - len(self._free) + len(self._waiting)
            torch.set_num_threads(max(1, min(most, self._cores // jobs)))
            job()
            with self._lock:
                if not self._waiting:
                    heapq.heappush(self._free, thread)
                    return
                job, most = self._waiting.popleft()

    def _begin(self) -> None:
        import torch

        # torch gives a new thread its default at first use, which would undo a choice made before.
        torch.get_num_threads()
