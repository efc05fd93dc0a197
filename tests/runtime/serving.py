"""A forkserver of the tests, which imports nothing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable

from encode_server.runtime.forkserver import Child, Forkserver

HERE = "tests.runtime.children"


@contextlib.asynccontextmanager
async def running(setup: str = "nothing", argument: bytes = b"") -> AsyncIterator[Forkserver]:
    """A forkserver that is kept running. `setup`: a function of `children.py`, or `module:function`."""
    server = Forkserver(setup if ":" in setup else f"{HERE}:{setup}", argument)
    server.start()
    keeper = asyncio.create_task(server.run())
    try:
        yield server
    finally:
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        assert server.pid is None


def fork(server: Forkserver, entry: str, argument: bytes = b"", fds: tuple[int, ...] = ()) -> Awaitable[Child]:
    """A child that runs a function of `children.py`."""
    return server.fork("a child", f"{HERE}:{entry}", argument, fds)
