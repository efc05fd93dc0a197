"""Children are forked, heard of, and never left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from encode_server.errors import StartupError
from encode_server.runtime import forkserver
from encode_server.runtime.forkserver import Forkserver, ForkserverLost
from tests.pipeline.desk import settle, until
from tests.runtime.serving import HERE, fork, running

ROOT = Path(__file__).parents[2]


def run(scenario: Callable[[Forkserver], Awaitable[None]], *setup: Any) -> None:
    async def scene() -> None:
        async with asyncio.timeout(60), running(*setup) as server:
            await scenario(server)

    asyncio.run(scene())


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("entry", "argument", "code"),
    [("exits", b"0", 0), ("exits", b"7", 7), ("fails", b"", 1), ("dies", b"11", -11), ("dies", b"9", -9)],
)
def test_how_a_child_ends_is_known(entry: str, argument: bytes, code: int) -> None:
    async def scenario(server: Forkserver) -> None:
        child = await fork(server, entry, argument)
        assert await child.exited == code
        assert not alive(child.pid)

    run(scenario)


def test_many_children_end_each_with_its_own_code() -> None:
    async def scenario(server: Forkserver) -> None:
        children = await asyncio.gather(*(fork(server, "exits", str(code).encode()) for code in range(30)))
        assert await asyncio.gather(*(child.exited for child in children)) == list(range(30))
        assert server.forked == 30

    run(scenario)


def test_a_child_gets_its_descriptors_and_its_name() -> None:
    async def scenario(server: Forkserver) -> None:
        ours, theirs = os.pipe()
        child = await fork(server, "writes", b"hello", (theirs,))
        os.close(theirs)
        assert await child.exited == 0
        assert os.read(ours, 100) == b"hello by a child"
        os.close(ours)

    run(scenario)


def test_a_child_is_killed_on_request() -> None:
    async def scenario(server: Forkserver) -> None:
        child = await fork(server, "sleeps")
        assert not child.exited.done()
        child.kill()
        assert await child.exited == -signal.SIGKILL
        child.kill()  # nothing happens

    run(scenario)


def test_a_fork_waits_for_the_imports_and_a_cancelled_one_leaves_no_child(tmp_path: Path) -> None:
    async def scenario(server: Forkserver) -> None:
        wanted = asyncio.ensure_future(fork(server, "exits", b"3"))
        left = asyncio.ensure_future(fork(server, "sleeps", str(tmp_path / "left").encode()))
        await settle()
        assert not wanted.done()
        left.cancel()
        (tmp_path / "imported").touch()
        assert await (await wanted).exited == 3
        await until(lambda: server.forked == 2)
        assert server.pid is not None
        await until(lambda: not children_of(server.pid or 0))

    run(scenario, "slowly", str(tmp_path / "imported").encode())


def children_of(pid: int) -> list[int]:
    """Its children that run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if alive(int(child))]


def test_children_end_with_a_killed_forkserver_and_another_is_started(tmp_path: Path) -> None:
    async def scenario(server: Forkserver) -> None:
        paths = [tmp_path / str(number) for number in range(3)]
        children = [await fork(server, "sleeps", str(path).encode()) for path in paths]
        await until(lambda: all(path.exists() for path in paths))
        os.kill(children[0].pid, signal.SIGSTOP)  # also one that is stopped
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert await asyncio.gather(*(child.exited for child in children)) == [-signal.SIGKILL] * 3
        assert not any(alive(child.pid) for child in children)
        assert await (await fork(server, "exits", b"5")).exited == 5
        assert server.pid not in (None, pid)

    run(scenario)


def test_a_fork_that_the_forkserver_does_not_live_to_make_is_lost(tmp_path: Path) -> None:
    async def scenario(server: Forkserver) -> None:
        asked = asyncio.ensure_future(fork(server, "exits", b"0"))
        await settle()
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ForkserverLost):
            await asked

    run(scenario, "slowly", str(tmp_path / "never").encode())


def test_a_forkserver_that_never_works_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "MAX_RESTARTS_IN_A_ROW", 1)

    async def scene() -> None:
        with pytest.raises(StartupError, match="ends with code 1 each time"):
            await Forkserver(f"{HERE}:broken").run()

    asyncio.run(scene())


def test_a_call_returns_what_the_function_does() -> None:
    async def scenario(server: Forkserver) -> None:
        assert await server.call(f"{HERE}:add", [1, 2, 3], int) == 6
        assert len(await server.call(f"{HERE}:large", 5 << 20, bytes)) == 5 << 20  # more than a socket holds

    run(scenario)


def test_a_call_that_fails_says_why() -> None:
    async def scenario(server: Forkserver) -> None:
        with pytest.raises(StartupError, match=r"^no such checkpoint$"):
            await server.call(f"{HERE}:refuses", "no such checkpoint", int)
        with pytest.raises(StartupError, match="vanishes ended with code -9"):
            await server.call(f"{HERE}:vanishes", None, int)

    run(scenario)


def test_a_cancelled_call_leaves_no_child(tmp_path: Path) -> None:
    async def scenario(server: Forkserver) -> None:
        path = tmp_path / "pid"
        call = asyncio.create_task(server.call(f"{HERE}:stays", str(path), int))
        await until(lambda: path.exists() and path.read_text() != "")
        pid = int(path.read_text())
        call.cancel()
        await until(lambda: not alive(pid))

    run(scenario)


def test_a_call_that_the_forkserver_does_not_outlive_can_be_made_again(tmp_path: Path) -> None:
    """Its child ends with the forkserver. That says nothing about the function."""

    async def scenario(server: Forkserver) -> None:
        path = tmp_path / "pid"
        call = asyncio.create_task(server.call(f"{HERE}:stays", str(path), int))
        await until(path.exists)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ForkserverLost):
            await call

    run(scenario)


FRONT = """
import asyncio, os
from encode_server.runtime.forkserver import Forkserver

async def main():
    server = Forkserver("tests.runtime.children:nothing")
    server.start()
    ours, theirs = os.pipe()
    child = await server.fork("a child", "tests.runtime.children:sleeps_after", b"here", (theirs,))
    await asyncio.to_thread(os.read, ours, 100)
    print(server.pid, child.pid, flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.parametrize("stopped", ["", "forkserver", "child"])
def test_nothing_outlives_a_killed_front(stopped: str) -> None:
    with subprocess.Popen([sys.executable, "-c", FRONT], cwd=ROOT, stdout=subprocess.PIPE, text=True) as front:
        assert front.stdout is not None
        pids = dict(zip(("forkserver", "child"), map(int, front.stdout.readline().split()), strict=True))
        if stopped:
            os.kill(pids[stopped], signal.SIGSTOP)
        front.kill()
    asyncio.run(until(lambda: not any(map(alive, pids.values()))))


def test_what_is_preloaded_starts_no_thread_and_touches_no_gpu() -> None:
    """Children of a process with either could use neither."""

    async def scenario(server: Forkserver) -> None:
        found = await server.call(f"{HERE}:threads_and_cuda", None, dict)
        assert found == {"threads": 1, "torch": True, "cuda": False, "device_open": False}

    argument = json.dumps({"model": "demo", "revision": None}).encode()
    run(scenario, "encode_server.models.preload:preload", argument)
