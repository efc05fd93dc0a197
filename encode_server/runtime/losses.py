"""How often a process had to be started again, and why the last time."""

from __future__ import annotations

import time

import msgspec


class Losses(msgspec.Struct):
    """`count`: losses so far. `cause`, in one word, `reason`, and `at`, Unix time, are of the last; empty and 0
    without one."""

    count: int = 0
    cause: str = ""
    reason: str = ""
    at: float = 0.0

    def note(self, cause: str, reason: str) -> None:
        """One more."""
        self.count += 1
        self.cause, self.reason, self.at = cause, reason, time.time()
