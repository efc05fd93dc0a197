"""Whether the client that asked is still there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

CALLER_GONE = 499  # nobody reads it; the word of nginx for it, in logs and metrics


class CallerGone(Exception):
    """The client closed its connection; what it asked for is not wanted any more."""


@contextlib.asynccontextmanager
async def until_caller_goes(http: Request) -> AsyncIterator[None]:
    """Cancel the body of the `async with`, and raise CallerGone, when the client disconnects."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await http.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if gone and task.uncancel() == 0:
            raise CallerGone from None
        raise
    finally:
        watcher.cancel()
