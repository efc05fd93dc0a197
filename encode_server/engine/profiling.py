"""Profiles of all ranks, on request, written to the one directory the operator chose."""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path

from encode_server.engine.groups import RankGroups
from encode_server.engine.profile_limits import PART
from encode_server.errors import BadRequest, EncodeError, Forbidden, StartupError
from encode_server.wire.ranks import Done

WRITTEN_S = 60.0  # time for the ranks' traces to be complete
LOOK_S = 0.05


class Profiling:
    """Starts and stops profiles. `directory` of None means that none may be taken; raises StartupError when there is no
    such directory and it cannot be made."""

    def __init__(self, directory: str | None) -> None:
        self._directory = None if directory is None else Path(directory).absolute()
        self._name = ""
        self._numbers = itertools.count(1)
        if self._directory is not None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StartupError(f"--profile-dir: {error.strerror}: {directory}") from None

    async def start(self, engine: RankGroups, forwards: int | None) -> None:
        """Have all ranks record, until `stop` or for so many forwards.

        Raises Forbidden without a directory, BadRequest when a profile runs already, NotReady without ranks.
        """
        name = time.strftime(f"profile-%Y%m%d-%H%M%S-{next(self._numbers)}-")
        dones = await engine.start_profile(str(self._checked() / name), forwards)
        if any(done.error for done in dones):
            raise _refusal(dones)
        self._name = name

    async def stop(self, engine: RankGroups) -> list[str]:
        """Have all ranks write their traces; the names of the files in the directory, once they are complete. Raises as
        `start` does, and EncodeError for a trace that cannot be written."""
        directory = self._checked()
        written = await engine.stop_profile()
        dones = [done for _, done in written]
        if all(done.error for done in dones):  # else some ranks came to a bound before the others
            raise _refusal(dones)
        files = [f"{self._name}{group}rank{done.rank}.json.gz" for group, done in written]
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


def _refusal(dones: list[Done]) -> BadRequest:
    return next(BadRequest(f"rank {done.rank}: {done.error}") for done in dones if done.error)
