"""Processor time by stage, as the thread that spends it counts it."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from encode_server.telemetry.metrics import Metrics

P = ParamSpec("P")
T = TypeVar("T")


class CpuClock:
    """A block in one thread: what it spends counts as `stage`'s, but for what `lap` gave to others before."""

    def __init__(self, metrics: Metrics, stage: str) -> None:
        self._metrics, self._stage, self._last = metrics, stage, time.thread_time()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.lap(self._stage)

    def lap(self, stage: str) -> None:
        """Count the time since the beginning, or the last lap, as of `stage`."""
        now = time.thread_time()
        self._metrics.stage_cpu.labels(stage).inc(now - self._last)
        self._last = now


def counted(metrics: Metrics, stage: str, function: Callable[P, T]) -> Callable[P, T]:
    """`function`, whose processor time counts as of `stage`."""

    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        with CpuClock(metrics, stage):
            return function(*args, **kwargs)

    return call
