"""What became of a request, for runs that do harm to the server meanwhile."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from encode_server.bench.client import Response


def refused(response: Response) -> bool:
    """Whether the server said, before it accepted the request, that the caller should come again."""
    return response.status in (429, 503) and "retry-after" in response.headers


@dataclass
class Tally:
    """How many requests were `answered`, `refused`, or accepted and `lost`; the reasons of the lost ones."""

    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def enter(self, response: Response) -> str:
        """Count a response; what it is counted as."""
        if response.status == 200:
            outcome = "answered"
        elif refused(response):
            outcome = "refused"
        else:
            outcome = "lost"
            self.reasons[f"{response.status} {response.error or response.body[:120]!r}"] += 1
        self.counts[outcome] += 1
        return outcome
