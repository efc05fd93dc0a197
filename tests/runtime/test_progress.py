"""A process that waits for a core is told from one that does nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from encode_server.runtime.progress import active_seconds, starved_seconds, waited
from tests.pipeline.desk import until
from tests.runtime.serving import fork, running

pytestmark = pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="this kernel does not say")


def test_a_process_beside_others_on_its_core_is_starved_and_a_stopped_one_is_not() -> None:
    core = str(min(os.sched_getaffinity(0))).encode()

    async def scene() -> None:
        async with asyncio.timeout(60), running() as server:
            children = [await fork(server, "spins", core) for _ in range(3)]
            pid = children[0].pid
            await until(lambda: active_seconds(pid) > 0.05)
            before, began, active = waited(pid), time.monotonic(), active_seconds(pid)
            await until(lambda: starved_seconds(pid, before) > 0.3)
            # Of the time that passed, two neighbours had two thirds.
            passed = time.monotonic() - began
            assert starved_seconds(pid, before) > 0.4 * passed
            assert active_seconds(pid) > active + 0.3

            os.kill(pid, signal.SIGSTOP)
            await until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            before, active = waited(pid), active_seconds(pid)
            await asyncio.sleep(0.2)
            assert starved_seconds(pid, before) == 0 and active_seconds(pid) == active

            children[1].kill()
            await children[1].exited
            assert active_seconds(children[1].pid) == 0 and waited(children[1].pid) == {}

    asyncio.run(scene())
