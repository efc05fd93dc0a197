"""The thread pools: media is prepared in one, answers in another, so that neither waits for the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

SMALL_COPY = 1 << 20  # bytes, copied in some 0.1 ms

P = ParamSpec("P")
T = TypeVar("T")


class Pools:
    """`preproc`: decode, preprocess, copy in. `send`: copy out, encode answers. `urgent`: the health probe's.

    `store`: write to a disk, which may hang.
    """

    def __init__(self, preproc_workers: int, send_workers: int) -> None:
        self.preproc_workers = preproc_workers
        self.preproc = ThreadPoolExecutor(preproc_workers, "preproc")
        self.send = ThreadPoolExecutor(send_workers, "send")
        self.store = ThreadPoolExecutor(2, "store")
        self.urgent = ThreadPoolExecutor(1, "urgent")

    def close(self) -> None:
        """Drop what has not started; threads end after what they run."""
        for pool in (self.preproc, self.send, self.store, self.urgent):
            pool.shutdown(wait=False, cancel_futures=True)


async def run(pool: Executor, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run in the pool. Cancelled before it starts, it never runs; later, its result is dropped."""
    return await asyncio.get_running_loop().run_in_executor(pool, lambda: function(*args, **kwargs))


async def copy(pool: Executor, nbytes: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what copies `nbytes`: in the pool to its end, but at once where that is quicker than to change threads."""
    if nbytes <= SMALL_COPY:
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
