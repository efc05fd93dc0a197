"""Whether the client that asked is still there."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.requests import Request

UNWATCHED_S = 0.1
CALLER_GONE = 499  # nobody reads it; the word of nginx for it, in logs and metrics


class CallerGone(Exception):
    """The client closed its connection; what it asked for is not wanted any more."""


class until_caller_goes:  # used as a function is
    """An `async with` whose body is cancelled, and that raises CallerGone, when the client disconnects.

    Nobody watches for the first moments: most requests end in them, and a watch costs each as much as its parsing.
    """

    def __init__(self, http: Request) -> None:
        self._http = http
        self._gone = False
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._begin = asyncio.get_running_loop().call_later(UNWATCHED_S, self._start)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._begin.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if isinstance(error, asyncio.CancelledError) and self._gone and self._task.uncancel() == 0:
            raise CallerGone from None

    def _start(self) -> None:
        self._watch = asyncio.create_task(self._until_gone())

    async def _until_gone(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass
        self._gone = True
        self._task.cancel()
