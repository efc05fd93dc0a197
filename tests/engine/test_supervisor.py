"""Ranks that are lost are started again, ranks that hang are found, and it is known when there is no hope."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

import msgspec
import pytest

from encode_server.engine import restarts, supervisor
from encode_server.engine.group import Cause, GroupLost, GroupSpec
from encode_server.engine.supervisor import COLD_FORWARDS, EngineState, Supervisor, SupervisorOptions
from encode_server.errors import StartupError
from encode_server.runtime.changes import Changes
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.modality import Modality
from tests.engine.group_standin import INFO, Groups
from tests.pipeline.desk import until

Scenario = Callable[[Supervisor, Groups], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Play a scenario with a supervisor that runs, and has been ready."""
    groups = Groups()
    monkeypatch.setattr(supervisor, "RankGroup", groups)
    monkeypatch.setattr(supervisor, "WATCH_S", 0.005)

    def play(scenario: Scenario, **options: Any) -> None:
        async def scene() -> None:
            spec = GroupSpec("", 1, "cpu", "float32", "float32", 1)
            settings = SupervisorOptions(**{"stall_s": 60.0, "load_timeout_s": 5.0, "restarts": 10} | options)
            nobody = cast(Any, None)
            engine = Supervisor(spec, nobody, nobody, settings, Metrics(), Changes())
            running = asyncio.create_task(engine.run())
            await until(lambda: engine.ready)
            try:
                await scenario(engine, groups)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
            assert groups.last.stopped
            assert engine.state in (EngineState.STOPPED, EngineState.FAILED)

        asyncio.run(scene())

    return play


def forward(engine: Supervisor, expected_s: float | None = None) -> asyncio.Task[Any]:
    return asyncio.create_task(engine.forward(Modality.IMAGE, (), expected_s))


async def warm(engine: Supervisor, groups: Groups) -> None:
    """Have the group end as many forwards as make it warm."""
    for _ in range(COLD_FORWARDS):
        task = forward(engine)
        await until(lambda: bool(groups.last.pending))
        groups.last.end_all()
        await task


def delays(caplog: pytest.LogCaptureFixture) -> list[float]:
    """What the log says of the pauses before restarts."""
    found = [record.args[-1] for record in caplog.records if record.args and "restarting in" in record.msg]
    return cast(list[float], found)


def test_ranks_that_got_work_done_are_started_again_without_delay(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(engine: Supervisor, groups: Groups) -> None:
        for index in range(5):
            await warm(engine, groups)
            groups.last.fail("rank 0 exited with SIGKILL", Cause.DIED)
            await until(lambda: len(groups.all) == index + 2 and engine.ready)  # noqa: B023
        assert engine.restarts == 5

    run(scenario)
    assert delays(caplog) == [0.0] * 5


def test_ranks_that_get_nothing_done_are_started_ever_later(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restarts, "FIRST_DELAY_S", 0.001)

    async def scenario(engine: Supervisor, groups: Groups) -> None:
        for index in range(4):
            groups.last.fail("rank 0 exited with SIGSEGV", Cause.DIED)
            await until(lambda: len(groups.all) == index + 2 and engine.ready)  # noqa: B023

    run(scenario)
    assert delays(caplog) == [0.001, 0.002, 0.004, 0.008]


def test_too_many_losses_without_work_are_fatal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_DELAY_S", 0.001)

    async def scenario(engine: Supervisor, groups: Groups) -> None:
        groups.failure = "no memory on device 0"
        groups.last.fail("rank 0 exited with SIGKILL", Cause.DIED)
        await until(lambda: engine.state is EngineState.FAILED)
        assert len(groups.all) == 4
        with pytest.raises(GroupLost, match="no memory on device 0"):
            await engine.forward(Modality.IMAGE, ())

    run(scenario, restarts=3)


def test_ranks_that_cannot_load_the_first_time_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = Groups()
    groups.failure = "the weights are of another model"
    monkeypatch.setattr(supervisor, "RankGroup", groups)
    nobody = cast(Any, None)
    options = SupervisorOptions(stall_s=60.0, load_timeout_s=5.0, restarts=10)

    async def scene() -> None:
        with pytest.raises(StartupError, match="of another model"):
            await Supervisor(
                GroupSpec("", 1, "cpu", "float32", "float32", 1), nobody, nobody, options, Metrics(), Changes()
            ).run()

    asyncio.run(scene())
    assert len(groups.all) == 1


def test_the_engine_is_not_ready_from_the_moment_of_the_loss(run: Run) -> None:
    async def scenario(engine: Supervisor, groups: Groups) -> None:
        task = forward(engine)
        await until(lambda: bool(groups.last.pending))
        groups.last.fail("rank 0 exited with SIGKILL", Cause.DIED)
        assert engine.state is EngineState.RESTARTING and not engine.ready and "SIGKILL" in engine.reason
        with pytest.raises(GroupLost):
            await engine.forward(Modality.IMAGE, ())
        with pytest.raises(GroupLost):
            await task
        await until(lambda: engine.ready)
        assert engine.info == INFO and len(groups.all) == 2

    run(scenario)


@pytest.mark.parametrize(
    ("expected_s", "sound_s", "hanging_s"),
    [(0.01, 4.9, 5.1), (2.0, 19.0, 21.0), (15.0, 59.0, 61.0), (40.0, 119.0, 121.0), (None, 59.0, 61.0)],
)
def test_a_forward_hangs_after_ten_times_what_it_should_take_and_five_seconds_at_least(
    run: Run, expected_s: float | None, sound_s: float, hanging_s: float
) -> None:
    async def scenario(engine: Supervisor, groups: Groups) -> None:
        await warm(engine, groups)
        task = forward(engine, expected_s)
        groups.last.age = sound_s
        await asyncio.sleep(0.03)  # several looks
        assert engine.ready and not task.done()
        groups.last.age = hanging_s
        with pytest.raises(GroupLost, match="the ranks hang: a forward") as lost:
            await task
        assert lost.value.suspect

    run(scenario, stall_s=60.0)


@pytest.mark.parametrize("halted", [True, False])
def test_a_rank_that_somebody_stopped_is_no_sign_against_the_forward(run: Run, halted: bool) -> None:
    async def scenario(engine: Supervisor, groups: Groups) -> None:
        task = forward(engine)
        groups.last.halted = halted
        groups.last.age = 61.0
        with pytest.raises(GroupLost) as lost:
            await task
        assert lost.value.outside is halted

    run(scenario)


def test_the_age_of_a_forward_leaves_out_the_time_without_a_core(run: Run) -> None:
    """Or a starved machine would be unhealthy: `age_s` is the group's, which knows that time."""

    async def scenario(engine: Supervisor, groups: Groups) -> None:
        task = forward(engine)
        await until(lambda: bool(groups.last.pending))
        groups.last.age = 0.25
        assert engine.forward_age_s() == 0.25
        groups.last.end_all()
        await task
        assert engine.forward_age_s() is None

    run(scenario)


def test_forwards_side_by_side_that_should_take_long_are_given_time_for_both(run: Run) -> None:
    """Two of the largest items, which a slow device executes concurrently, take twice as long as one."""

    async def scenario(engine: Supervisor, groups: Groups) -> None:
        await warm(engine, groups)
        engine.info = msgspec.structs.replace(INFO, at_once=2, computing=2)
        tasks = [forward(engine, 40.0) for _ in range(2)]
        await until(lambda: len(groups.last.pending) == 2)
        groups.last.age = 160.0
        await asyncio.sleep(0.03)  # several looks
        assert engine.ready and engine.limit_s() == 240.0
        # On a GPU the second is queued behind the first: neither has to share the device.
        engine.info = msgspec.structs.replace(INFO, at_once=2, computing=1)
        groups.last.age = 100.0
        await asyncio.sleep(0.03)
        assert engine.ready and engine.limit_s() == 120.0
        groups.last.end_all()
        await asyncio.gather(*tasks)

    run(scenario, stall_s=60.0)


def test_the_first_forwards_of_a_group_may_take_the_upper_bound(run: Run) -> None:
    """They compile kernels."""

    async def scenario(engine: Supervisor, groups: Groups) -> None:
        task = forward(engine, 0.01)
        groups.last.age = 50.0
        await asyncio.sleep(0.03)
        assert engine.ready and not task.done()
        assert engine.limit_s() == 60.0
        groups.last.age = 0.0
        groups.last.end_all()
        await task

    run(scenario)


def test_idle_ranks_that_do_not_answer_are_lost(run: Run) -> None:
    async def scenario(engine: Supervisor, groups: Groups) -> None:
        await until(lambda: bool(groups.last.pending))  # a ping
        assert engine.forward_age_s() is None
        groups.last.age = 16.0
        await until(lambda: len(groups.all) == 2)
        assert "a ping has not ended" in groups.all[0].lost.result()

    run(scenario, ping_s=0.01)


def test_what_is_asked_of_stopped_ranks_is_lost(run: Run) -> None:
    kept: list[Supervisor] = []

    async def scenario(engine: Supervisor, groups: Groups) -> None:
        kept.append(engine)

    run(scenario)
    with pytest.raises(GroupLost, match="stopping"):
        asyncio.run(kept[0].forward(Modality.IMAGE, ()))


def test_a_line_in_the_log_says_why(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(engine: Supervisor, groups: Groups) -> None:
        await warm(engine, groups)
        groups.last.fail("rank 0 exited with SIGKILL", Cause.DIED)
        await until(lambda: len(groups.all) == 2)

    with caplog.at_level(logging.ERROR):
        run(scenario)
    assert "ranks lost (rank 0 exited with SIGKILL); restarting in 0.00 s" in caplog.text


def test_a_loss_is_told_only_when_the_ranks_are_gone(run: Run) -> None:
    """Until then they may write to the arena, so what the batch held must not go to others."""

    async def scenario(engine: Supervisor, groups: Groups) -> None:
        groups.stays = asyncio.Event()
        task = forward(engine)
        await until(lambda: bool(groups.last.pending))
        groups.last.fail("rank 0 exited with SIGKILL", Cause.DIED)
        await asyncio.sleep(0.02)
        assert not task.done() and not engine.ready
        groups.stays.set()
        with pytest.raises(GroupLost, match="SIGKILL"):
            await task

    run(scenario)


def test_a_rank_that_cannot_be_killed_is_fatal(run: Run) -> None:
    async def scenario(engine: Supervisor, groups: Groups) -> None:
        groups.unkillable = True
        task = forward(engine)
        await until(lambda: bool(groups.last.pending))
        groups.last.fail("the ranks hang", Cause.HANG)
        await until(lambda: engine.state is EngineState.FAILED)
        assert "cannot be killed" in engine.reason and not task.done()
        assert len(groups.all) == 1, "another group was started beside the one that is not gone"
        task.cancel()

    run(scenario)
