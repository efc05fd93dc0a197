"""When lost ranks are started again: soon after a single loss, ever later when they keep dying, and not for ever."""

from __future__ import annotations

from encode_server.engine.restarts import LONGEST_DELAY_S, STEADY_S, Restarts


def test_ranks_that_die_of_being_started_are_started_ever_later() -> None:
    restarts = Restarts(10, 600.0, clock=lambda: 0.0)
    delays = [restarts.delay(ready_s=0.0) or 0.0 for _ in range(10)]
    assert delays[:4] == [0.25, 0.5, 1.0, 2.0]
    assert delays[-1] == LONGEST_DELAY_S


def test_a_loss_after_a_good_while_is_made_up_for_at_once() -> None:
    restarts = Restarts(10, 600.0, clock=lambda: 0.0)
    for _ in range(5):
        restarts.delay(ready_s=0.0)
    assert restarts.delay(ready_s=STEADY_S) == 0.25
    assert restarts.delay(ready_s=0.0) == 0.25
    assert restarts.delay(ready_s=0.0) == 0.5


def test_too_many_within_the_window_are_the_last() -> None:
    now = 0.0
    restarts = Restarts(2, 600.0, clock=lambda: now)
    assert restarts.delay(STEADY_S) is not None
    now = 300.0
    assert restarts.delay(STEADY_S) is not None
    assert restarts.delay(STEADY_S) is None
    now = 601.0  # the first is out of the window
    assert restarts.delay(STEADY_S) is not None
    assert restarts.count == 3


def test_none_allowed_means_none() -> None:
    assert Restarts(0, 600.0).delay(STEADY_S) is None
