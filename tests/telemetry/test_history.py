"""What a server remembers of its requests: percentiles, slots that expire, kinds of failures; all bounded."""

from __future__ import annotations

import pytest

from encode_server.route.history import RouteHistory
from encode_server.telemetry.history import (
    DESTINATIONS,
    FAILURES,
    MAX_TEXT,
    SLOT_S,
    SLOTS,
    SLOWEST,
    History,
    without_queries,
)


class Clock:
    """A clock that stands until it is moved; Unix time is 1000 s ahead of it."""

    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def history(clock: Clock) -> History:
    return History(clock, lambda: clock.now + 1000)


def end(history: History, total: float = 0.1, outcome: str = "ok", **more: object) -> None:
    known = {"request_id": "r", "req_id": "a", "modality": "image", "destination": "answer", "items": 1, "tokens": 4}
    stages = {"forward": total / 2, "total": total}
    history.end_request(outcome=outcome, stages=stages, **known | more)


def stage(history: History, name: str):
    return next(times for times in history.stages() if times.stage == name)


def test_percentiles_are_within_a_tenth(history):
    for milliseconds in range(1, 1001):
        end(history, milliseconds / 1000)
    total = stage(history, "total")
    assert total.count == 1000
    assert total.p50 == pytest.approx(500, rel=0.11) and total.p99 == pytest.approx(990, rel=0.11)
    assert stage(history, "forward").p50 == pytest.approx(250, rel=0.11)
    assert stage(history, "fetch").count == 0


def test_what_is_older_than_the_history_is_gone(history, clock):
    end(history, 9.0)
    clock.now += SLOT_S * (SLOTS - 1)
    end(history, 0.01)
    assert stage(history, "total").count == 2 and [one.ms["total"] for one in history.slowest()] == [9000, 10]
    clock.now += SLOT_S
    assert stage(history, "total").count == 1 and stage(history, "total").p99 < 20
    assert [one.ms["total"] for one in history.slowest()] == [10]
    clock.now += 10 * SLOT_S * SLOTS  # nobody looked for hours
    assert stage(history, "total").count == 0 and history.slowest() == []
    assert sum(history.timeline().ok) == 0


def test_the_timeline_has_a_slot_for_each_ten_seconds(history, clock):
    end(history)
    history.sample(in_progress=7, waiting=2, backlog_s=0.5)
    history.sample(in_progress=3, waiting=1, backlog_s=0.25)
    clock.now += SLOT_S
    end(history, outcome="internal", broken=True)
    seen = history.timeline()
    assert seen.ok == [1, 0] and seen.failed == [0, 1] and seen.in_progress == [7, 0]
    assert seen.p50[0] == pytest.approx(100, rel=0.11) and seen.p50[1] is None
    assert seen.end == 1000 + 20, "the slot from 10 to 20 s still fills"
    for _ in range(3 * SLOTS):
        clock.now += SLOT_S
        history.sample(1, 1, 1)
    assert len(history.timeline().ok) == SLOTS


def test_failures_alike_are_one_kind_and_callers_mistakes_do_not_push_out_the_servers(history, clock):
    end(history, outcome="internal", message="rank 3 failed", broken=True)
    for number in range(100):
        clock.now += 0.01
        end(history, outcome="bad_request", message=f"unknown field {chr(97 + number % 26)}")
        end(history, outcome="too_busy", message=f"{number} requests are in progress", bound="requests")
    found = history.failures()
    assert len(found) == FAILURES + 2
    busy = next(failure for failure in found if failure.last.outcome == "too_busy")
    assert busy.count == 100 and busy.last.message == "99 requests are in progress" and busy.first_at < busy.last.at
    assert any(failure.last.outcome == "internal" for failure in found)


def test_a_bound_refuses_for_ten_seconds_after_its_last_refusal(history, clock):
    end(history, outcome="too_busy", bound="bytes")
    assert list(history.refusing()) == ["bytes"] and history.refusals["bytes"] == 1
    clock.now += 11
    assert history.refusing() == {} and history.refusals["bytes"] == 1


def test_destinations_that_fail_are_counted_and_bounded(history, clock):
    for number in range(DESTINATIONS + 10):
        end(history, outcome="delivery_failed", message="nobody there", target=f"10.0.0.{number}:5555")
    end(history, target="10.0.0.70:5555")
    end(history, target="10.0.0.200:5555")
    names = {target.name: target for target in history.failing()}
    assert len(names) == DESTINATIONS - 1 and "10.0.0.0:5555" not in names and "10.0.0.200:5555" not in names
    assert (names["10.0.0.70:5555"].failed, names["10.0.0.70:5555"].delivered) == (1, 1)


def test_only_the_slowest_are_kept(history):
    for milliseconds in range(1, 501):
        end(history, milliseconds / 1000)
    assert [round(one.ms["total"]) for one in history.slowest()] == list(range(500, 500 - SLOWEST, -1))


def test_since_stays_while_the_level_does(history, clock):
    history.judge("well", "idle")
    clock.now += 60
    history.judge("well", "3 requests in progress")
    assert (history.verdict.reason, history.verdict.since) == ("3 requests in progress", 1005)
    history.judge("full", "requests are refused")
    assert history.verdict.since == 1065


def test_texts_hold_no_queries_no_credentials_no_media_and_end():
    text = "https://user:secret@h.example/a.png?token=secret#x is no image, nor is 'data:image/png;base64,secret'"
    assert without_queries(text) == "https://h.example/a.png?… is no image, nor is 'data:…'"
    assert without_queries("x" * 5000) == "x" * MAX_TEXT + "…"
    assert without_queries("is 3 > 2? yes") == "is 3 > 2? yes"


def test_the_proxys_timeline_counts_every_request_and_keeps_its_own_failures():
    history = RouteHistory()
    for status, seconds in ((200, 0.1), (200, 0.1), (404, 0.1), (503, 2.0), (0, 1.0)):
        history.end_request("POST", "/v1/chat/completions", status, seconds)
    timeline = history.timeline()
    assert (sum(timeline.ok), sum(timeline.failed)) == (2, 3)
    assert timeline.p99[-1] is None or timeline.p99[-1] == pytest.approx(100, rel=0.1), "failures have no latency"
    assert [failure.status for failure in history.failures()] == [0, 503], "a 404 is the caller's own"
