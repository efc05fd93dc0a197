"""The front's thread pools, and the one rule for what runs in them and what runs on the loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from enum import Enum
from typing import ParamSpec, TypeVar

INLINE_S = 1e-4  # what takes less time than this runs on the loop: a change of threads takes as long
SMALL_COPY = 1 << 20  # bytes that are copied in `INLINE_S`

P = ParamSpec("P")
T = TypeVar("T")


class Pace(Enum):
    """Bytes a second of the front's kinds of work, measured on one core of a slow machine."""

    COPY = SMALL_COPY / INLINE_S
    HASH = 0.65e9  # SHA-256
    BASE64 = 1.3e9
    JSON = 0.65e9


class Pools:
    """`work`: hash, decode base64 and JSON, read files. `send`: copy embeddings out. `store`: write to a disk, which
    may hang. Each is a pool of its own, so that none waits for another."""

    def __init__(self, send_workers: int) -> None:
        self.work = ThreadPoolExecutor(4, "work")
        self.send = ThreadPoolExecutor(send_workers, "send")
        self.store = ThreadPoolExecutor(2, "store")

    def close(self) -> None:
        """Drop what has not started; threads end after what they run."""
        for pool in (self.work, self.send, self.store):
            pool.shutdown(wait=False, cancel_futures=True)


async def run(pool: Executor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run in the pool. Cancelled before it starts, it never runs; later, its result is dropped."""
    return await asyncio.get_running_loop().run_in_executor(pool, lambda: function(*args, **kwargs))


async def run_sized(
    pool: Executor, pace: Pace, nbytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
) -> T:
    """Run what works through `nbytes` at that pace: in the pool to its end, but on the loop where that takes less time
    than a change of threads."""
    if nbytes <= INLINE_S * pace.value:
        return function(*args, **kwargs)
    return await run_to_end(pool, function, *args, **kwargs)


async def run_to_end(pool: Executor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run in the pool; a cancellation waits for the thread, which still uses the memory it was given."""
    job = pool.submit(lambda: function(*args, **kwargs))
    future = asyncio.wrap_future(job)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        if not job.cancel():  # asked of the pool's future: asyncio's would call a running one cancelled
            while not future.done():  # however often it is cancelled
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait((future,))
            future.exception()  # nobody is left to care
        raise
