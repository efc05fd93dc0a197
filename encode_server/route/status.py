"""`GET /status` of the proxy: its table of encoders."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from encode_server import __version__
from encode_server.client.encoders import Encoder
from encode_server.route.fleet import Fleet
from encode_server.route.history import Failure, RouteHistory
from encode_server.telemetry.history import Timeline, Verdict, without_queries


class EncoderRow(msgspec.Struct, frozen=True):
    """One encoder. `source`: how the proxy knows of it. `busy_s`: for how long the encoder asked to be sent nothing.
    `in_flight`: items. `failures`: requests that came to nothing there."""

    url: str
    healthy: bool
    source: str
    busy_s: float
    in_flight: int
    backlog_s: float
    failures: int


class RouteStatus(msgspec.Struct, frozen=True):
    """A proxy. `engine`: whether the engine is well, None where there is none. Times as in `service.status.Status`."""

    version: str
    started_at: float
    now: float
    verdict: Verdict
    engine_url: str | None
    engine: bool | None
    requests_in_progress: int
    encoders: list[EncoderRow]
    failures: list[Failure]
    timeline: Timeline


def route_status(
    encoders: Iterable[Encoder],
    fleet: Fleet,
    history: RouteHistory,
    *,
    engine_url: str | None,
    engine: bool | None,
    requests_in_progress: int,
    draining: bool,
) -> RouteStatus:
    """The document, as of now."""
    now = time.monotonic()
    registered = frozenset(fleet.registered)
    rows = [
        EncoderRow(
            url=without_queries(encoder.url),
            healthy=encoder.healthy,
            source="registration" if encoder.url in registered else "options",
            busy_s=max(0.0, encoder.not_before - now),
            in_flight=encoder.in_flight,
            backlog_s=encoder.work.seconds,
            failures=encoder.failures,
        )
        for encoder in encoders
    ]
    level, reason = _judge(rows, engine, draining)
    return RouteStatus(
        version=__version__,
        started_at=history.started_at,
        now=time.time(),
        verdict=history.judge(level, reason),
        engine_url=None if engine_url is None else without_queries(engine_url),
        engine=engine,
        requests_in_progress=requests_in_progress,
        encoders=rows,
        failures=history.failures(),
        timeline=history.timeline(),
    )


def _judge(rows: list[EncoderRow], engine: bool | None, draining: bool) -> tuple[str, str]:
    sick = [row.url for row in rows if not row.healthy]
    if draining:
        return "leaving", "The proxy is stopping."
    if len(sick) == len(rows):
        return "down", "No encoder is well." if rows else "No encoder is known."
    if engine is False:
        return "down", "The engine is not well."
    if sick:
        return "impaired", f"{len(sick)} of {len(rows)} encoders {'is' if len(sick) == 1 else 'are'} not well."
    return "well", "Every encoder is well."
