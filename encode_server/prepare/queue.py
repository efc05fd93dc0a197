"""Which item is prepared next."""

from __future__ import annotations

from collections import deque

from encode_server.prepare.jobs import PreparingJob

LONG_SHARE = 0.75  # of all threads; the rest is for short items, so that a long video cannot starve images


class PreparingQueue:
    """Items that wait for a preparer's thread: the oldest first, but no more long ones than leave room for short ones.

    `isolated` holds items that must be alone in a process, because a process died while it worked on them.
    """

    def __init__(self, threads: int) -> None:
        self._most_long = max(1, int(threads * LONG_SHARE))
        self._short: deque[PreparingJob] = deque()
        self._long: deque[PreparingJob] = deque()
        self.isolated: deque[PreparingJob] = deque()

    def __len__(self) -> int:
        return len(self._short) + len(self._long) + len(self.isolated)

    def put(self, job: PreparingJob) -> None:
        """Queue an item; an item whose process died comes before the others."""
        queue = self.isolated if job.alone else self._long if job.long else self._short
        if job.deaths:
            queue.appendleft(job)
        else:
            queue.append(job)

    def take(self, long_in_progress: int) -> PreparingJob | None:
        """The next item that may share a process, while so many long ones are being prepared; None when there is
        none."""
        may_begin = self._long and long_in_progress < self._most_long
        if may_begin and (not self._short or self._long[0].number < self._short[0].number):
            return self._long.popleft()
        return self._short.popleft() if self._short else None

    def remove(self, job: PreparingJob) -> None:
        """Take the item out, if it is there: nobody wants it any more."""
        for queue in (self._short, self._long, self.isolated):
            if job in queue:
                queue.remove(job)

    def drain(self) -> list[PreparingJob]:
        """Everything queued, taken out."""
        jobs = [*self._short, *self._long, *self.isolated]
        for queue in (self._short, self._long, self.isolated):
            queue.clear()
        return jobs
