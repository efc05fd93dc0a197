"""Several groups of ranks side by side: one that is lost is missed by nobody, and comes back once it has encoded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from encode_server.engine import groups as groups_module
from encode_server.engine import restarts, supervisor
from encode_server.engine.group import Cause, GroupLost, GroupSpec
from encode_server.engine.groups import RankGroups
from encode_server.engine.supervisor import EngineState, SupervisorOptions
from encode_server.errors import NotReady, StartupError
from encode_server.telemetry.metrics import Metrics
from tests.engine.group_standin import Groups
from tests.pipeline.desk import until


class Stage:
    """Rank groups that run, over stand-ins. `flaws`: what proving a group says is wrong with it, by its index."""

    def __init__(self, count: int, restarts: int) -> None:
        self.standins = Groups()
        self.flaws: dict[int, str] = {}
        self.proven: list[int] = []
        nobody = cast(Any, None)
        spec = GroupSpec("", 1, "cpu", "float32", "float32", 1, groups=count)
        options = SupervisorOptions(stall_s=60.0, load_timeout_s=5.0, restarts=restarts)
        self.metrics = Metrics(groups=count)
        self.groups = RankGroups(spec, nobody, nobody, options, self.metrics, self._prove)
        self.running: asyncio.Task[None]

    @property
    def ready(self) -> list[bool]:
        return [group.ready for group in self.groups.groups]

    @property
    def states(self) -> list[EngineState]:
        return [group.state for group in self.groups.groups]

    def kill(self, index: int) -> None:
        self.standins.of(index)[-1].fail("rank 0 exited with SIGKILL", Cause.DIED)

    async def _prove(self, index: int) -> str:
        self.proven.append(index)
        return self.flaws.get(index, "")


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(supervisor, "WATCH_S", 0.005)
    monkeypatch.setattr(supervisor, "PROVE_AGAIN_S", 0.005)
    monkeypatch.setattr(restarts, "FIRST_DELAY_S", 0.001)
    monkeypatch.setattr(restarts, "LONGEST_DELAY_S", 0.001)

    def run(scenario: Callable[[Stage], Awaitable[None]], *, count: int = 3, restarts: int = 2) -> None:
        async def scene() -> None:
            stage = Stage(count, restarts)
            monkeypatch.setattr(supervisor, "RankGroup", stage.standins)
            stage.running = asyncio.create_task(stage.groups.run())
            try:
                await scenario(stage)
            finally:
                stage.running.cancel()
                await asyncio.gather(stage.running, return_exceptions=True)
            assert all(group.stopped for group in stage.standins.all)

        asyncio.run(scene())

    return run


def test_the_loss_of_one_group_leaves_the_whole_ready(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        await until(lambda: all(stage.ready))
        stage.kill(1)
        assert stage.ready == [True, False, True] and stage.groups.ready
        await until(lambda: all(stage.ready))
        assert [len(stage.standins.of(index)) for index in range(3)] == [1, 2, 1]
        assert stage.groups.restarts == 1

    play(scenario)


def test_a_group_is_ready_once_it_has_encoded(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.flaws[2] = "image: values that are not finite"
        await until(lambda: stage.ready == [True, True, False] and stage.proven.count(2) > 2)
        assert stage.groups.groups[2].state is EngineState.PROVING
        assert stage.groups.groups[2].reason == "image: values that are not finite"
        assert stage.groups.groups[2].loaded
        stage.flaws.clear()
        await until(lambda: all(stage.ready))

    play(scenario)


def test_one_group_alone_needs_no_proof(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        await until(lambda: stage.groups.ready)
        assert stage.proven == []

    play(scenario, count=1)


def test_a_group_that_cannot_start_leaves_the_others_at_work(
    play: Callable[..., None], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups_module, "AGAIN_S", 0.02)

    async def scenario(stage: Stage) -> None:
        stage.standins.failure, stage.standins.failing = "no memory on device 1", {1}
        await until(lambda: stage.ready == [True, False, True] and len(stage.standins.of(1)) > 3)
        assert not stage.running.done() and stage.groups.state is EngineState.READY
        stage.standins.failure = ""  # and when its device is well again, the group is back
        await until(lambda: all(stage.ready))

    with caplog.at_level(logging.ERROR):
        play(scenario)
    assert "group 1 is out of use, and is tried again in 0.02 s: no memory on device 1" in caplog.text


def test_a_group_that_dies_again_and_again_leaves_the_others_at_work(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        await until(lambda: all(stage.ready))
        for index in range(3):
            stage.kill(0)
            await until(lambda: len(stage.standins.of(0)) == index + 2 or stage.states[0] is EngineState.FAILED)  # noqa: B023
            await until(lambda: stage.ready[0] or stage.states[0] is EngineState.FAILED)
        assert stage.ready == [False, True, True] and not stage.running.done()
        assert "SIGKILL" in stage.groups.groups[0].reason

    play(scenario)


def test_when_every_group_has_failed_the_server_has(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.standins.failure = "2 GPUs are needed, found 1"
        with pytest.raises(StartupError, match="2 GPUs are needed"):
            await stage.running
        with pytest.raises(GroupLost, match="2 GPUs are needed"):
            await stage.groups.wait_ready()
        with pytest.raises(NotReady, match="2 GPUs are needed"):
            await stage.groups.until_ready()

    play(scenario)


def test_a_rank_that_cannot_be_killed_ends_the_server_whatever_the_others_do(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        await until(lambda: all(stage.ready))
        stage.standins.unkillable = True
        stage.kill(2)
        with pytest.raises(StartupError, match="cannot be killed"):
            await stage.running

    play(scenario)
