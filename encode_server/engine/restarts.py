"""When lost ranks are started again, and when no more."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

FIRST_DELAY_S = 0.25
LONGEST_DELAY_S = 15.0


class Restarts:
    """Ranks that had got work done are started again immediately, however often they are lost. Ranks that end before
    they have done anything are not helped by haste: at most `allowed` such losses within `window_s` seconds, each
    followed by twice the delay of the last one, up to 15 s. With `allowed` 0 no ranks are started again, whether they
    had got work done or not.
    """

    def __init__(self, allowed: int, window_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed, self._window_s, self._clock = allowed, window_s, clock
        self._barren: deque[float] = deque()
        self._in_a_row = 0
        self.count = 0

    def delay(self, *, worked: bool) -> float | None:
        """Seconds to wait before the next start, which is counted; None when there must be none.

        `worked`: the lost group had ended a forward.
        """
        if self._allowed == 0:
            return None
        if worked:
            self._in_a_row = 0
            self.count += 1
            return 0.0
        now = self._clock()
        while self._barren and now - self._barren[0] > self._window_s:
            self._barren.popleft()
        if len(self._barren) >= self._allowed:
            return None
        self._barren.append(now)
        self._in_a_row += 1
        self.count += 1
        return float(min(FIRST_DELAY_S * 2 ** (self._in_a_row - 1), LONGEST_DELAY_S))
