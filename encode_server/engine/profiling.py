"""Profiles of all ranks, on request, written to the one directory the operator chose."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

from encode_server.engine.groups import RankGroups
from encode_server.errors import BadRequest, Forbidden, StartupError
from encode_server.wire.ranks import Done


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
        _check(await engine.start_profile(str(self._checked() / name), forwards))
        self._name = name

    async def stop(self, engine: RankGroups) -> list[str]:
        """Have all ranks write their traces; the names of the files in the directory. Raises as `start` does."""
        self._checked()
        written = await engine.stop_profile()
        _check([done for _, done in written])
        return [f"{self._name}{group}rank{done.rank}.json.gz" for group, done in written]

    def _checked(self) -> Path:
        if self._directory is None:
            raise Forbidden("no profiles: this server was started without --profile-dir")
        return self._directory


def _check(dones: list[Done]) -> None:
    for done in dones:
        if done.error:
            raise BadRequest(f"rank {done.rank}: {done.error}")
