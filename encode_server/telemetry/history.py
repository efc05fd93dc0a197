"""What happened in the last quarter of an hour, for whoever looks at a server without a Prometheus beside it.

One `History` belongs to one server. Everything in it is bounded: time by `SLOTS` slots of `SLOT_S` seconds, requests
and destinations by number, texts by length.
"""

from __future__ import annotations

import heapq
import math
import re
import time
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec

SLOT_S = 10.0
SLOTS = 90
STAGES = ("fetch", "preprocess", "copy", "queue", "forward", "deliver", "total")
FAILURES = 12  # kinds of failures kept: so many of the server's, and as many of the callers' own
SLOWEST = 10  # requests shown; so many are kept of each slot
DESTINATIONS = 64
MAX_TEXT = 300  # characters of a message or a name that are kept
RECENT_S = 10.0  # a bound that refused so long ago still refuses

# Upper ends of the buckets in which durations are counted, in seconds: each a fifth above the one before.
BUCKETS = tuple(0.0001 * 1.2**step for step in range(82))
_QUERY = re.compile(r"([a-z][a-z0-9+.-]*://[^\s?#'\"]*)[?#][^\s'\"]*", re.IGNORECASE)
_CREDENTIALS = re.compile(r"(://)[^\s/@'\"]*@")
_NUMBERS = re.compile(r"\d+")
_DATA = re.compile(r"data:[^\s'\"]*", re.IGNORECASE)


class Ended(msgspec.Struct, frozen=True):
    """A request that has ended. `at`: Unix time of its end. `ms`: milliseconds by stage, `total` among them. `message`:
    what the caller was told, empty on success."""

    at: float
    request_id: str
    req_id: str
    modality: str
    destination: str
    outcome: str
    message: str
    items: int
    tokens: int
    ms: dict[str, float]


class Failure(msgspec.Struct):
    """Requests that failed alike: the same outcome, and the same message but for its numbers. `first_at`: Unix time.
    `last`: the last of them."""

    count: int
    first_at: float
    last: Ended


class Target(msgspec.Struct):
    """A destination of pushed or stored embeddings. `last_failure` and `failed_at` (Unix time) are of the last one."""

    name: str
    delivered: int = 0
    failed: int = 0
    last_failure: str = ""
    failed_at: float = 0.0


class StageTimes(msgspec.Struct, frozen=True):
    """How long a stage took, in milliseconds, within a tenth; `count`: requests that passed the stage."""

    stage: str
    count: int
    p50: float
    p99: float


class Timeline(msgspec.Struct, frozen=True):
    """Slots of `step_s` seconds, the oldest first; `end`: Unix time of the end of the last, which still fills.

    `ok`, `failed`: requests that ended. `in_progress`, `waiting`: the most at a time; `backlog_s`: the longest.
    `p50`, `p99`: milliseconds of a whole request, None where none ended well.
    """

    step_s: float
    end: float
    ok: list[int]
    failed: list[int]
    in_progress: list[int]
    waiting: list[int]
    backlog_s: list[float]
    p50: list[float | None]
    p99: list[float | None]


class Verdict(msgspec.Struct, frozen=True):
    """How the server is, why, and since when (Unix time). `level`: `well`, `full`, `impaired`, `starting`, `leaving` or
    `down`."""

    level: str
    reason: str
    since: float


@dataclass
class _Slot:
    counts: dict[str, Counter[int]] = field(default_factory=dict)  # per stage, by bucket
    ok: int = 0
    failed: int = 0
    broken: int = 0
    in_progress: int = 0
    waiting: int = 0
    backlog_s: float = 0.0
    slowest: list[tuple[float, int, Ended]] = field(default_factory=list)  # a heap
    quantiles: tuple[float | None, float | None] = (None, None)  # once the slot is closed


class History:
    """Owner of what one server remembers of its requests. Used on the server's loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._clock, self._wall = clock, wall
        self._slots: deque[_Slot] = deque([_Slot()], maxlen=SLOTS)
        self._number = int(clock() // SLOT_S)  # of the last slot
        self._counts: dict[str, Counter[int]] = {stage: Counter() for stage in STAGES}  # of all slots
        self._ended = 0
        # Apart, so that strangers' mistakes cannot push a fault of the server out.
        self._failures: dict[bool, OrderedDict[tuple[str, str], Failure]] = {True: OrderedDict(), False: OrderedDict()}
        self._targets: OrderedDict[str, Target] = OrderedDict()  # the one used last is the last
        self._refused: dict[str, float] = {}  # when each bound refused last, of the clock
        self.refusals: Counter[str] = Counter()
        self._verdict = Verdict("starting", "", wall())

    def end_request(
        self,
        *,
        request_id: str,
        req_id: str,
        modality: str,
        destination: str,
        outcome: str,
        items: int,
        tokens: int,
        stages: Mapping[str, float],
        message: str = "",
        target: str | None = None,
        bound: str | None = None,
        broken: bool = False,
    ) -> None:
        """A request has ended. `stages`: seconds by stage. `target`: where its embedding was sent. `bound`: which of
        the server's bounds refused. `broken`: the failure is the server's, not the caller's."""
        ok = outcome == "ok"
        self.count(ok=ok, stages=stages, broken=broken)
        slot = self._slot()
        self._ended += 1
        if bound is not None:
            self.refusals[bound] += 1
            self._refused[bound] = self._clock()
        total = stages.get("total", 0.0)
        slow = len(slot.slowest) < SLOWEST or total > slot.slowest[0][0]
        if ok and not slow and target is None:
            return
        ended = Ended(
            at=self._wall(),
            request_id=request_id[:MAX_TEXT],
            req_id=req_id[:MAX_TEXT],
            modality=modality,
            destination=destination,
            outcome=outcome,
            message=without_queries(message),
            items=items,
            tokens=tokens,
            ms={stage: round(seconds * 1000, 2) for stage, seconds in stages.items()},
        )
        if not ok:
            self._note_failure(self._failures[broken or bound is not None or target is not None], ended)
        elif slow:
            push = heapq.heappush if len(slot.slowest) < SLOWEST else heapq.heapreplace
            push(slot.slowest, (total, self._ended, ended))
        if target is not None and (ok or outcome in ("delivery_failed", "store_full")):
            self._note_delivery(target[:MAX_TEXT], ended)

    def count(self, *, ok: bool, stages: Mapping[str, float], broken: bool = False) -> None:
        """A request has ended, of which nothing but its times is kept; arguments as of `end_request`."""
        slot = self._slot()
        if not ok:
            slot.failed += 1
            slot.broken += broken
            return
        slot.ok += 1
        for stage in stages.keys() & self._counts.keys():
            bucket = bisect_left(BUCKETS, stages[stage])
            self._counts[stage][bucket] += 1
            slot.counts.setdefault(stage, Counter())[bucket] += 1

    def sample(self, in_progress: int, waiting: int, backlog_s: float) -> None:
        """What the server holds now; the most of each slot is kept."""
        slot = self._slot()
        slot.in_progress = max(slot.in_progress, in_progress)
        slot.waiting = max(slot.waiting, waiting)
        slot.backlog_s = max(slot.backlog_s, backlog_s)

    def judge(self, level: str, reason: str) -> None:
        """How the server is now; `since` stays while the level does."""
        since = self._verdict.since if self._verdict.level == level else self._wall()
        self._verdict = Verdict(level, without_queries(reason), since)

    @property
    def verdict(self) -> Verdict:
        """The last judgement."""
        return self._verdict

    def refusing(self) -> dict[str, float]:
        """The bounds that refused a request within the last `RECENT_S` seconds, with the seconds since then."""
        now = self._clock()
        return {bound: now - at for bound, at in self._refused.items() if now - at <= RECENT_S}

    def last_minute(self) -> tuple[int, int]:
        """Requests that ended within the last minute, and those of them that the server failed."""
        self._slot()
        recent = list(self._slots)[-int(60 // SLOT_S) :]
        return sum(slot.ok + slot.failed for slot in recent), sum(slot.broken for slot in recent)

    def failures(self) -> list[Failure]:
        """The requests that did not end well, in kinds, the one that happened last first."""
        both = [failure for kinds in self._failures.values() for failure in kinds.values()]
        return sorted(both, key=lambda failure: failure.last.at, reverse=True)

    def slowest(self) -> list[Ended]:
        """The slowest requests that ended well, the slowest first."""
        self._slot()
        found = heapq.nlargest(SLOWEST, (entry for slot in self._slots for entry in slot.slowest))
        return [ended for _, _, ended in found]

    def failing(self) -> list[Target]:
        """Destinations that an embedding did not reach, the one that failed last first."""
        return sorted((t for t in self._targets.values() if t.failed), key=lambda t: t.failed_at, reverse=True)

    def stages(self) -> list[StageTimes]:
        """How long each stage took."""
        self._slot()
        return [
            StageTimes(stage, counts.total(), _ms(counts, 0.5) or 0.0, _ms(counts, 0.99) or 0.0)
            for stage, counts in self._counts.items()
        ]

    def timeline(self) -> Timeline:
        """The slots. Slots before the server's start are left out."""
        self._slot()
        slots = list(self._slots)
        quantiles = [slot.quantiles for slot in slots[:-1]] + [_quantiles(slots[-1])]
        end = self._wall() + (self._number + 1) * SLOT_S - self._clock()
        return Timeline(
            step_s=SLOT_S,
            end=round(end, 1),
            ok=[slot.ok for slot in slots],
            failed=[slot.failed for slot in slots],
            in_progress=[slot.in_progress for slot in slots],
            waiting=[slot.waiting for slot in slots],
            backlog_s=[round(slot.backlog_s, 3) for slot in slots],
            p50=[pair[0] for pair in quantiles],
            p99=[pair[1] for pair in quantiles],
        )

    def _slot(self) -> _Slot:
        """The slot of now. Slots that are older than the history's time go, and their counts with them."""
        number = int(self._clock() // SLOT_S)
        for _ in range(min(number - self._number, SLOTS)):
            self._slots[-1].quantiles = _quantiles(self._slots[-1])
            if len(self._slots) == SLOTS:
                for stage, counts in self._slots[0].counts.items():
                    self._counts[stage].subtract(counts)
                    self._counts[stage] += Counter()  # drops what is 0
            self._slots.append(_Slot())
        self._number = max(number, self._number)
        return self._slots[-1]

    def _note_failure(self, kinds: OrderedDict[tuple[str, str], Failure], ended: Ended) -> None:
        key = (ended.outcome, _NUMBERS.sub("0", ended.message))
        failure = kinds.pop(key, None) or Failure(0, ended.at, ended)
        kinds[key] = failure
        failure.count += 1
        failure.last = ended
        if len(kinds) > FAILURES:
            kinds.popitem(last=False)

    def _note_delivery(self, name: str, ended: Ended) -> None:
        target = self._targets.pop(name, None) or Target(name)
        self._targets[name] = target
        if ended.outcome == "ok":
            target.delivered += 1
        else:
            target.failed += 1
            target.last_failure, target.failed_at = ended.message, ended.at
        if len(self._targets) > DESTINATIONS:
            self._targets.popitem(last=False)


def without_queries(text: str) -> str:
    """The text without what URLs may hold of secrets or media: credentials, queries, data. Cut to `MAX_TEXT`
    characters."""
    text = _DATA.sub("data:…", text)
    text = _CREDENTIALS.sub(r"\1", _QUERY.sub(r"\1?…", text))
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def _quantiles(slot: _Slot) -> tuple[float | None, float | None]:
    counts = slot.counts.get("total", Counter())
    return _ms(counts, 0.5), _ms(counts, 0.99)


def _ms(counts: Counter[int], share: float) -> float | None:
    """The duration in milliseconds that so large a share does not exceed: the middle of its bucket."""
    rank, seen = share * counts.total(), 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen >= rank and seen:
            upper = BUCKETS[min(bucket, len(BUCKETS) - 1)]
            return round(upper * 1000 / math.sqrt(1.2), 2)
    return None
