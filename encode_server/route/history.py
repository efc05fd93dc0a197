"""What a proxy remembers for whoever looks at its page."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from encode_server.telemetry.history import FAILURES, MAX_TEXT, History, Timeline, Verdict
from encode_server.telemetry.ids import current_ids


class Failure(msgspec.Struct, frozen=True):
    """A request that the proxy or an encoder failed. `at`: Unix time of its end. `status`: 0 where its caller had gone
    before an answer began. `ms`: milliseconds. `path` is without the query."""

    at: float
    method: str
    path: str
    status: int
    ms: float
    request_id: str


class RouteHistory:
    """The last failures, the last verdict, and the last quarter of an hour of one proxy."""

    def __init__(self) -> None:
        self.started_at = time.time()
        self._failures: deque[Failure] = deque(maxlen=FAILURES)
        self._requests = History()
        self.verdict = Verdict("starting", "", self.started_at)

    def end_request(self, method: str, path: str, status: int, seconds: float) -> None:
        """A request has ended. All are counted; what is kept are failures that are not the caller's own."""
        self._requests.count(ok=0 < status < 400, stages={"total": seconds})
        if 0 < status < 500 and status != 429:
            return
        ids = current_ids()
        request_id = ids.request_id if ids is not None else ""
        self._failures.append(Failure(time.time(), method, path[:MAX_TEXT], status, seconds * 1000, request_id))

    def failures(self) -> list[Failure]:
        """The last ones, the newest first."""
        return list(reversed(self._failures))

    def timeline(self) -> Timeline:
        """Requests by time. `in_progress`, `waiting` and `backlog_s` are not sampled, and stay 0."""
        return self._requests.timeline()

    def judge(self, level: str, reason: str) -> Verdict:
        """The verdict of now; `since` stays while the level does."""
        since = self.verdict.since if self.verdict.level == level else time.time()
        self.verdict = Verdict(level, reason, since)
        return self.verdict
