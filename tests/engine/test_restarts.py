"""Lost ranks are started again: immediately if they had got work done; else ever later, and in the end no more."""

from __future__ import annotations

from encode_server.engine.restarts import LONGEST_DELAY_S, Restarts


def test_ranks_that_never_get_work_done_are_started_ever_later() -> None:
    restarts = Restarts(10, 600.0, clock=lambda: 0.0)
    delays = [restarts.delay(worked=False) or 0.0 for _ in range(10)]
    assert delays[:4] == [0.25, 0.5, 1.0, 2.0]
    assert delays[-1] == LONGEST_DELAY_S


def test_ranks_that_had_served_are_started_immediately_however_often_they_are_lost() -> None:
    restarts = Restarts(2, 600.0, clock=lambda: 0.0)
    assert [restarts.delay(worked=True) for _ in range(50)] == [0.0] * 50
    assert restarts.count == 50


def test_work_done_makes_up_for_losses_before() -> None:
    restarts = Restarts(10, 600.0, clock=lambda: 0.0)
    for _ in range(5):
        restarts.delay(worked=False)
    assert restarts.delay(worked=True) == 0.0
    assert restarts.delay(worked=False) == 0.25


def test_too_many_within_the_window_are_the_last() -> None:
    now = 0.0
    restarts = Restarts(2, 600.0, clock=lambda: now)
    assert restarts.delay(worked=False) is not None
    now = 300.0
    assert restarts.delay(worked=False) is not None
    assert restarts.delay(worked=False) is None
    now = 601.0  # the first is out of the window
    assert restarts.delay(worked=False) is not None
    assert restarts.count == 3


def test_none_allowed_means_none() -> None:
    assert Restarts(0, 600.0).delay(worked=True) is None
