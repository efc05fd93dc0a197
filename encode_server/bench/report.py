"""What a load came to: rates, latencies, outcomes."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from encode_server.bench.client import Response
from encode_server.bench.source import LoadRequest


@dataclass(frozen=True)
class Result:
    """One request and what came of it. `latency_s` counts from when it was due to be sent."""

    request: LoadRequest
    response: Response
    latency_s: float

    @property
    def ok(self) -> bool:
        """Whether it was answered with 200."""
        return self.response.status == 200


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending values, the smallest that `percent` of them don't exceed; 0 when there are none."""
    if not ordered:
        return 0.0
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass
class LoadReport:
    """Counts of what ended while it was measured; times in seconds.

    `outcomes` by HTTP status, `0` for no answer, `errors` by its reason or the first words of the server's.
    `ends`: when each good answer came, its items and tokens. `cpu_s`: processor time of the client itself.
    `skipped`: requests of a warm-up, in nothing else here.
    """

    seconds: float = 0.0
    cpu_s: float = 0.0
    requests: int = 0
    items: int = 0
    tokens: int = 0
    bytes_in: int = 0
    skipped: int = 0
    outcomes: Counter[int] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    ends: list[tuple[float, int, int]] = field(default_factory=list)

    def add(self, result: Result, now: float) -> None:
        """Count a result that arrived at `now`; only those with status 200 have a latency."""
        response = result.response
        self.requests += 1
        self.outcomes[response.status] += 1
        self.bytes_in += response.size
        if not result.ok:
            self.errors[response.error or response.body[:200].decode("utf-8", "replace")] += 1
            return
        items, tokens = result.request.items, next(iter(response.shape), 0)
        self.items += items
        self.tokens += tokens
        self.ends.append((now, items, tokens))
        self.latencies[result.request.kind].append(result.latency_s)

    @property
    def failed(self) -> int:
        """Requests without status 200."""
        return self.requests - self.outcomes[200]

    @property
    def items_per_s(self) -> float:
        """Media items encoded per second."""
        return self._rates()[0]

    @property
    def tokens_per_s(self) -> float:
        """Rows of embeddings per second."""
        return self._rates()[1]

    def latency_s(self, percent: float, kind: str | None = None) -> float:
        """A percentile of the answered requests' latencies, of one kind or of all."""
        chosen = self.latencies.values() if kind is None else [self.latencies.get(kind, [])]
        return percentile(sorted(value for values in chosen for value in values), percent)

    def document(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "seconds": self.seconds,
            "requests": self.requests,
            "items": self.items,
            "tokens": self.tokens,
            "bytes_in": self.bytes_in,
            "items_per_s": self.items_per_s,
            "tokens_per_s": self.tokens_per_s,
            "latency_s": self._percentiles(None),
            "latency_s_by_kind": {kind: self._percentiles(kind) for kind in sorted(self.latencies)},
            "outcomes": {str(status): count for status, count in sorted(self.outcomes.items())},
            "errors": dict(self.errors.most_common(10)),
            "client_cpu_s": self.cpu_s,
            "client_cpu_s_per_request": self.cpu_s / self.requests if self.requests else 0.0,
        }

    def _rates(self) -> tuple[float, float]:
        """Items and tokens per second, counted from pause to pause.

        Answers come in bursts, a batch at a time. Where the clock cuts a burst in two, or just misses one, a short
        measurement would be off by a batch; between the longest pauses of its first and last third lie whole batches.
        """
        third = len(self.ends) // 3
        if third >= 2:
            first, last = self._pause(0, third), self._pause(len(self.ends) - third, len(self.ends))
            if (seconds := self.ends[last][0] - self.ends[first][0]) > 0:
                counted = self.ends[first + 1 : last + 1]
                return sum(items for _, items, _ in counted) / seconds, sum(n for _, _, n in counted) / seconds
        return (self.items / self.seconds, self.tokens / self.seconds) if self.seconds else (0.0, 0.0)

    def _pause(self, begin: int, end: int) -> int:
        """Index of the last answer before the longest pause among those from `begin` to `end`."""
        return max(range(begin, end - 1), key=lambda index: self.ends[index + 1][0] - self.ends[index][0])

    def _percentiles(self, kind: str | None) -> Mapping[str, float]:
        return {f"p{percent}": self.latency_s(percent, kind) for percent in (50, 90, 99)}
