"""Profiles of several groups, of which some are lost, not ready, or busy with the last trace."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import pytest

from encode_server.engine import profiling
from encode_server.engine.group import GroupLost, GroupSpec
from encode_server.engine.groups import RankGroups
from encode_server.engine.profile_limits import PART
from encode_server.engine.profiling import Profiling
from encode_server.engine.supervisor import SupervisorOptions
from encode_server.errors import BadRequest
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.ranks import Done


class OneRank:
    """A group of one rank that records as `Profiler` does. A trace is complete when `write` is called, or, unless it
    is `slow`, when the profile is stopped."""

    def __init__(self, index: int) -> None:
        self.ready, self.slow, self.lost = True, False, False
        self.rank_pids = [index]
        self.recording = self.writing = ""

    async def start_profile(self, path: str, forwards: int | None) -> list[Done]:
        if self.lost:
            raise GroupLost("rank 0 exited")
        if self.recording or self.writing:
            return [Done(0, 1, error="a profile is already running")]
        self.recording = f"{path}rank0.json.gz"
        self._begin()
        return [Done(0, 1)]

    async def stop_profile(self) -> list[Done]:
        if not self.recording:
            return [Done(0, 1, error="no profile is running")]
        self.writing, self.recording = self.recording, ""
        if not self.slow:
            self.write()
        return [Done(0, 1)]

    def _begin(self) -> None:
        Path(self.recording + PART).touch()

    def write(self) -> None:
        Path(self.writing + PART).rename(self.writing)
        self.writing = ""

    def restart(self) -> None:
        self.rank_pids = [self.rank_pids[0] + 100]
        self.recording = self.writing = ""


class Stage:
    """Two groups, whose traces go to `folder`."""

    def __init__(self, folder: Path) -> None:
        nobody = cast(Any, None)
        spec = GroupSpec("", 1, "cpu", "float32", "float32", 1, groups=2)
        options = SupervisorOptions(stall_s=60.0, load_timeout_s=5.0, restarts=2)
        self.first, self.second = OneRank(0), OneRank(1)
        self.engine = RankGroups(spec, nobody, nobody, options, Metrics(groups=2), lambda index: nobody)
        self.engine.groups = cast(Any, [self.first, self.second])
        self.folder = folder
        self.profiling = Profiling(str(folder))

    async def start(self) -> None:
        await self.profiling.start(self.engine, None)

    def parts(self) -> list[Path]:
        """The files of traces that are not complete."""
        return list(self.folder.glob("*" + PART))

    async def stop(self) -> list[str]:
        """The groups whose traces are complete."""
        return [name.rsplit("-", 2)[1] for name in await self.profiling.stop(self.engine)]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Stage], Awaitable[None]]], None]:
    monkeypatch.setattr(profiling, "WRITTEN_S", 0.2)

    def run(scenario: Callable[[Stage], Awaitable[None]]) -> None:
        async def scene() -> None:
            await scenario(Stage(tmp_path))

        asyncio.run(scene())

    return run


def test_a_group_that_became_ready_meanwhile_has_no_trace(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.second.ready = False
        await stage.start()
        stage.second.ready = True
        assert await stage.stop() == ["group0"]

    play(scenario)


def test_a_start_that_one_group_refuses_leaves_no_group_recording(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.start()
        stage.first.slow = True
        stopping = asyncio.create_task(stage.stop())
        await asyncio.sleep(0.01)
        with pytest.raises(BadRequest, match="group0-rank 0: a profile is already running"):
            await stage.start()
        assert not stage.second.recording
        stage.first.write()
        assert await stopping == ["group0", "group1"]
        await stage.start()
        stage.first.slow = False
        assert await stage.stop() == ["group0", "group1"]

    play(scenario)


def test_a_refused_start_leaves_the_profile_that_runs(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.second.ready = False
        await stage.start()
        stage.second.ready = True
        with pytest.raises(BadRequest):
            await stage.start()
        assert stage.first.recording and not stage.second.recording
        assert await stage.stop() == ["group0"]

    play(scenario)


def test_a_group_that_is_lost_while_it_is_asked_is_missed_by_nobody(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        stage.second.lost = True
        await stage.start()
        assert await stage.stop() == ["group0"]

    play(scenario)


def test_nobody_waits_for_the_trace_of_a_rank_that_died(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.start()
        stage.second.restart()
        assert await stage.stop() == ["group0"]
        assert stage.parts() == []

    play(scenario)


def test_a_trace_for_which_there_is_no_room_is_told(play: Callable[..., None]) -> None:
    async def scenario(stage: Stage) -> None:
        await stage.start()
        stage.second.slow = True
        stopping = asyncio.create_task(stage.stop())
        await asyncio.sleep(0.01)
        for part in stage.parts():
            part.unlink()
        with pytest.raises(profiling.EncodeError, match=r"for lack of room: .*group1"):
            await stopping

    play(scenario)
