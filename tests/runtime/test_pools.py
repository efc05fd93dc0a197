"""Work in threads that outlives the request it was for."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from encode_server.runtime.pools import run_to_end


def test_a_cancellation_waits_for_the_thread_that_uses_the_memory():
    """Also a second one: memory given back too early would be written to for another request."""
    started, gate, ended = threading.Event(), threading.Event(), threading.Event()

    def copy():
        started.set()
        gate.wait(10)
        ended.set()

    async def cancelled():
        with ThreadPoolExecutor(1) as pool:
            task = asyncio.create_task(run_to_end(pool, copy))
            await asyncio.to_thread(started.wait, 10)
            for _ in range(2):
                task.cancel()
                await asyncio.sleep(0.05)
                assert not task.done()
            gate.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended.is_set()

    asyncio.run(cancelled())


def test_what_has_not_started_never_runs():
    gate, ran = threading.Event(), []

    async def cancelled():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(gate.wait, 10)
            task = asyncio.create_task(run_to_end(pool, ran.append, 1))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.set()

    asyncio.run(cancelled())
    assert ran == []
