"""Who may come in: a bound on the requests in work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from encode_server.errors import TooBusy
from encode_server.telemetry.metrics import Metrics


class Admission:
    """Counts the requests in work and refuses more than `max_requests`."""

    def __init__(self, max_requests: int, metrics: Metrics) -> None:
        self._max, self._metrics = max_requests, metrics
        self.in_work = 0

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Hold one place. Raises TooBusy when there is none."""
        if self.in_work >= self._max:
            raise TooBusy(f"{self.in_work} requests are in work, the limit", headers={"Retry-After": "1"})
        self.in_work += 1
        self._metrics.in_work.set(self.in_work)
        try:
            yield
        finally:
            self.in_work -= 1
            self._metrics.in_work.set(self.in_work)
