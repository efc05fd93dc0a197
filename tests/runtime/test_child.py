"""A child that the forkserver forked, as the front sees its end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys

from encode_server.runtime.forkserver import Child


def test_a_child_that_is_gone_but_not_reported_can_be_killed_again():
    """The forkserver is lost with its children: nobody reports their exit codes, and their owners kill them."""

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    async def run() -> int:
        child = Child(process.pid, os.pidfd_open(process.pid))
        child.kill()
        await asyncio.to_thread(process.wait)
        await asyncio.sleep(0)  # the loop sees the pidfd at its next look, and then waits for a report
        while not child.exited.done():
            child.kill()
            await asyncio.sleep(0.01)
        return child.exited.result()

    assert asyncio.run(run()) == -signal.SIGKILL
