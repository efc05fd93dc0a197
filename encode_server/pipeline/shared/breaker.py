"""When to stop asking something that fails, and when to try it again."""

from __future__ import annotations

import time
from collections.abc import Callable

FAILURES = 3  # in a row, before nobody asks any more
FIRST_S, MOST_S = 0.5, 30.0  # until the first trial; each trial in vain doubles the time


class Breaker:
    """Closed while what it guards works. Open after `FAILURES` failures in a row: then one trial at a time is let
    through, ever more rarely, and its success closes the breaker."""

    def __init__(self, on_open: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        """`on_open`: called whenever the breaker opens."""
        self._on_open, self._clock = on_open, clock
        self._failures = 0
        self._wait_s = FIRST_S
        self._next_trial: float | None = None  # None while closed
        self._trying = False

    @property
    def closed(self) -> bool:
        """Whether everybody may ask."""
        return self._next_trial is None

    def admits(self) -> bool:
        """Whether the caller may ask now. If so, the caller reports one of the three below."""
        if self._next_trial is None:
            return True
        if self._trying or self._clock() < self._next_trial:
            return False
        self._trying = True
        return True

    def succeeded(self) -> None:
        """It works."""
        self._failures, self._trying, self._next_trial, self._wait_s = 0, False, None, FIRST_S

    def failed(self) -> None:
        """It does not. While the breaker is open, only the trial's failure counts: others were asked before."""
        if self._next_trial is not None and not self._trying:
            return
        self._failures += 1
        if not self._trying and self._failures < FAILURES:
            return
        if self._trying:
            self._wait_s = min(self._wait_s * 2, MOST_S)
        self._trying, self._failures = False, 0
        self._next_trial = self._clock() + self._wait_s
        self._on_open()

    def abandoned(self) -> None:
        """Nobody waited for the outcome."""
        self._trying = False
