"""Profiles of all ranks, on request, written to the one directory the operator chose."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from pathlib import Path

from encode_server.engine.groups import RankGroups, Told
from encode_server.engine.profile_limits import PART
from encode_server.errors import BadRequest, EncodeError, Forbidden, NotReady, StartupError

WRITTEN_S = 60.0  # time for the ranks' traces to be complete
LOOK_S = 0.05


class Profiling:
    """Starts and stops profiles. `directory` of None means that none may be taken; raises StartupError when there is no
    such directory and it cannot be made."""

    def __init__(self, directory: str | None) -> None:
        self._directory = None if directory is None else Path(directory).absolute()
        self._name = ""
        self._recorded: dict[str, int | None] = {}  # files of the last profile, and the ranks that record them, by pid
        self._numbers = itertools.count(1)
        if self._directory is not None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StartupError(f"--profile-dir: {error.strerror}: {directory}") from None

    async def start(self, engine: RankGroups, forwards: int | None) -> None:
        """Have all ranks record, until `stop` or for so many forwards. Where some cannot, none does.

        Raises Forbidden without a directory, BadRequest when a profile runs already, NotReady without ranks.
        """
        name = time.strftime(f"profile-%Y%m%d-%H%M%S-{next(self._numbers)}-")
        answers = await engine.start_profile(str(self._checked() / name), forwards)
        if any(told.done.error for told in answers):
            if began := {told.group for told in answers if not told.done.error}:
                with contextlib.suppress(NotReady):  # then those groups are lost
                    await engine.stop_profile(began)
            raise _refusal(answers)
        self._recorded = {_file(name, told): told.pid for told in answers}
        self._name = name

    async def stop(self, engine: RankGroups) -> list[str]:
        """Have all ranks write their traces; the names of the files in the directory, once they are complete. Raises as
        `start` does, and EncodeError for a trace that cannot be written."""
        directory = self._checked()
        answers = await engine.stop_profile()
        pids = {_file(self._name, told): told.pid for told in answers}
        files = []
        for name, pid in self._recorded.items():
            if pids.get(name) == pid:
                files.append(name)
            else:  # the rank has died, and nobody completes its trace
                for left in directory.glob(name + PART + "*"):
                    left.unlink(missing_ok=True)
        if not files or all(told.done.error for told in answers):  # else some came to a bound before the others
            raise _refusal(answers)
        until = time.monotonic() + WRITTEN_S
        # Ranks go on with their work while a thread of theirs writes; nothing else is announced of that thread.
        while any((directory / (name + PART)).exists() for name in files) and time.monotonic() < until:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)
        if missing := [name for name in files if not (directory / name).exists()]:
            raise EncodeError(f"not written within {WRITTEN_S:g} s, or for lack of room: {', '.join(missing)}")
        return files

    def _checked(self) -> Path:
        if self._directory is None:
            raise Forbidden("no profiles: this server was started without --profile-dir")
        return self._directory


def _file(name: str, told: Told) -> str:
    return f"{name}{told.group}rank{told.done.rank}.json.gz"


def _refusal(answers: list[Told]) -> BadRequest:
    refused = (f"{told.group}rank {told.done.rank}: {told.done.error}" for told in answers if told.done.error)
    return BadRequest(next(refused, "no profile is running"))
