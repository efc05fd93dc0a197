"""How much work a group still has: what decides which of several groups gets a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from encode_server.pipeline import group_work
from encode_server.pipeline.group_work import GroupWork, Sent


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(group_work, "time", clock)
    yield clock


def task() -> asyncio.Task[None]:
    return cast(Any, object())


def work(computing: int) -> GroupWork:
    info = SimpleNamespace(at_once=2, computing=computing)
    return GroupWork(0, cast(Any, SimpleNamespace(info=info)))


def test_on_a_gpu_a_batch_that_waited_behind_another_still_has_all_its_work(clock: Clock) -> None:
    group, first, second = work(1), task(), task()
    group.add(first, Sent(True, 10.0))
    group.add(second, Sent(True, 4.0))
    clock.now += 8
    assert group.seconds == 2 + 4
    clock.now += 4  # the first takes longer than it should
    assert group.seconds == 0 + 4
    group.remove(first)
    assert group.seconds == 4
    clock.now += 3
    assert group.seconds == 1


def test_on_a_cpu_the_time_passes_for_all_that_are_computed_concurrently(clock: Clock) -> None:
    group = work(2)
    tasks = [task() for _ in range(3)]
    for one in tasks:
        group.add(one, Sent(True, 10.0))
    clock.now += 4
    assert group.seconds == 6 + 6 + 10
    group.remove(tasks[0])
    clock.now += 1
    assert group.seconds == 5 + 9


def test_a_group_without_work_or_without_learnt_costs_has_none(clock: Clock) -> None:
    group, one = work(1), task()
    assert group.seconds == 0
    group.add(one, Sent(True, 0.0))
    clock.now += 9
    assert group.seconds == 0
    group.remove(one)
    group.remove(one)
    assert group.seconds == 0
