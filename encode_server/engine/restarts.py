"""When lost ranks are started again, and when no more."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 15.0
STEADY_S = 10.0  # a group that has run for so long is not one that dies of being started


class Restarts:
    """At most `allowed` restarts within `window_s` seconds. One after the other waits twice as long, up to 15 s, until
    a group has been ready for 10 s: ranks that die at once are not helped by haste, others need no punishment.
    """

    def __init__(self, allowed: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed, self._window_s, self._clock = allowed, window_s, clock
        self._recent: deque[float] = deque()
        self._in_a_row = 0
        self.count = 0

    def delay(self, ready_s: float) -> float | None:
        """Seconds to wait before the next start, which is counted; None when there must be none.

        `ready_s`: for how long the lost group had been ready.
        """
        now = self._clock()
        while self._recent and now - self._recent[0] > self._window_s:
            self._recent.popleft()
        if len(self._recent) >= self._allowed:
            return None
        self._recent.append(now)
        self.count += 1
        self._in_a_row = 0 if ready_s >= STEADY_S else self._in_a_row + 1
        return min(FIRST_DELAY_S * 2.0 ** max(0, self._in_a_row - 1), LONGEST_DELAY_S)
