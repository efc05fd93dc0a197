"""The highest rate that holds an objective: an open loop, faster and faster until the objective is missed, then closer
and closer from both sides.

A request counts by when it was due. One that is refused, fails or comes too late misses the objective, and so does one
that never comes: a server that falls behind cannot hide in the requests that are not answered yet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from encode_server.bench.client import LoadClient
from encode_server.bench.load import Load, run_load
from encode_server.bench.report import LoadReport, Result, percentile
from encode_server.bench.source import LoadRequest
from encode_server.errors import StartupError

HIGHEST_RATE = 1e6
LOWEST = 64  # of the first rate, the lowest that is tried
LEAST_COUNTED = 20  # requests of a step before the step may be given up


@dataclass(frozen=True)
class Objective:
    """`percent` of the requests are answered well within `seconds`."""

    seconds: float
    percent: float = 99.0

    def __post_init__(self) -> None:
        if self.seconds <= 0 or not 0 < self.percent < 100:
            raise StartupError("an objective takes milliseconds above zero, and a percentile above 0 and below 100")

    def __str__(self) -> str:
        return f"{self.percent:g} % within {self.seconds * 1e3:g} ms"


@dataclass
class Step:
    """What came of one rate, in requests a second. `items_per_s`: media answered in time. `given_up`: the objective
    could not be held any more before the step's time was up."""

    rate: float
    due: int = 0
    in_time: int = 0
    items: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)
    given_up: bool = False

    def holds(self, objective: Objective) -> bool:
        """Whether the objective was held."""
        return not self.given_up and self.due > 0 and self.in_time >= self.due * objective.percent / 100

    @property
    def items_per_s(self) -> float:
        """Media answered in time, per second."""
        return self.items / self.seconds if self.seconds else 0.0

    def document(self, objective: Objective) -> dict[str, Any]:
        """As plain data, for JSON."""
        ordered = sorted(self.latencies)
        return {
            "rate": self.rate,
            "holds": self.holds(objective),
            "due": self.due,
            "in_time": self.in_time,
            "items_per_s": self.items_per_s,
            "latency_s": {f"p{percent}": percentile(ordered, percent) for percent in (50, 90, 99)},
            "outcomes": self.outcomes,
            "given_up": self.given_up,
        }


OnProgress = Callable[[float, LoadReport], None]
Measure = Callable[[float], Any]  # a rate → Awaitable[Step]


class _Hopeless(Exception):
    """The objective is missed already."""


async def measure_rate(
    client: LoadClient,
    requests: Iterator[LoadRequest],
    rate: float,
    objective: Objective,
    *,
    seconds: float,
    warmup_s: float,
    on_progress: OnProgress | None = None,
) -> Step:
    """Send at `rate` for `seconds` after `warmup_s`, and count what was due in that time."""
    step = Step(rate, seconds=seconds)
    begin = time.perf_counter() + warmup_s
    spare = rate * seconds * (1 - objective.percent / 100)

    def note(result: Result) -> None:
        due = time.perf_counter() - result.latency_s
        if not begin <= due < begin + seconds:
            return
        step.due += 1
        step.outcomes[str(result.response.status)] = step.outcomes.get(str(result.response.status), 0) + 1
        if result.ok:
            step.latencies.append(result.latency_s)
        if result.ok and result.latency_s <= objective.seconds:
            step.in_time += 1
            step.items += result.request.items
        elif step.due >= LEAST_COUNTED and step.due - step.in_time > spare + 1:
            raise _Hopeless

    load = Load(rate=rate, seconds=seconds, warmup_s=warmup_s)
    try:
        await run_load(client, requests, load, on_result=note, on_progress=on_progress)
    except* _Hopeless:
        step.given_up = True
        step.seconds = max(1e-3, min(seconds, time.perf_counter() - begin))
    return step


async def highest_rate(measure: Measure, objective: Objective, first: float, precision: float) -> list[Step]:
    """Every step of the search, in their order. `first`: the first rate. The search ends when the lowest rate that
    missed is at most `precision` (0.1: a tenth) above the highest that held."""
    steps: list[Step] = []
    held, missed = 0.0, float("inf")
    rate = first
    while rate < HIGHEST_RATE and rate >= first / LOWEST:
        step = await measure(rate)
        steps.append(step)
        if step.holds(objective):
            held = max(held, rate)
        else:
            missed = min(missed, rate)
        if held and missed <= held * (1 + precision):
            break
        rate = held * 2 if missed == float("inf") else missed / 2 if not held else (held * missed) ** 0.5
        if rate in (held, missed):  # no number lies between the two
            break
    return steps


def best(steps: list[Step], objective: Objective) -> Step | None:
    """The step of the highest rate that held the objective; None when none did."""
    return max((step for step in steps if step.holds(objective)), key=lambda step: step.rate, default=None)
