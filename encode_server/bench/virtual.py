"""An event loop in virtual time: a sleep takes no time, and the order of events is that of their times.

So asyncio code runs as a discrete-event simulation of itself, without a line of it being written again.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock stands still while code runs, and jumps to the next timer when all code waits."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        """Virtual seconds."""
        return self._now

    def jump(self, seconds: float) -> None:
        """Let so much virtual time pass."""
        self._now += seconds


class _Jump(selectors.SelectSelector):
    """Waits for nothing: where the loop would sleep until its next timer, the clock jumps there."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Whatever is ready now."""
        if timeout is None:
            raise RuntimeError("the simulation waits for something that never happens")
        if timeout > 0:
            self._loop.jump(timeout)
        return super().select(0)


def simulated(run: Coroutine[Any, Any, T]) -> T:
    """The result of `run`, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(run)
