"""Messages between the front and a child: in order, whole, none dropped."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zmq

from encode_server.errors import StartupError
from encode_server.runtime.link import LARGE
from encode_server.runtime.peer import Peer
from encode_server.runtime.rundir import RunDirectory
from tests.pipeline.desk import until
from tests.runtime.serving import HERE, running


class Echo:
    """A child that sends everything back, and what has come back."""

    def __init__(self, peer: Peer, start: Callable[[], Awaitable[None]], got: list[bytes]) -> None:
        self.peer, self.start, self.got = peer, start, got


def run(scenario: Callable[[Echo], Awaitable[None]]) -> None:
    async def scene() -> None:
        async with asyncio.timeout(60), running() as server:
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            got: list[bytes] = []
            peer = Peer(context, lambda frames: got.extend(frames))

            async def start() -> None:
                await peer.start(server, "echo", f"{HERE}:echo", peer.link.path.encode(), ())

            try:
                await scenario(Echo(peer, start, got))
            finally:
                await peer.close()
                context.destroy(linger=0)

    asyncio.run(scene())


def test_messages_arrive_in_order() -> None:
    async def scenario(echo: Echo) -> None:
        await echo.start()
        sent = [str(number).encode() for number in range(3000)]
        for message in sent:
            echo.peer.link.send(message)
        await until(lambda: len(echo.got) == len(sent))
        assert echo.got == sent

    run(scenario)


def test_what_is_sent_before_the_child_exists_arrives() -> None:
    async def scenario(echo: Echo) -> None:
        for number in range(10):
            echo.peer.link.send(b"early", str(number).encode())
        await echo.start()
        echo.peer.link.send(b"late")
        await until(lambda: len(echo.got) == 11)
        assert echo.got == [b"early%d" % number for number in range(10)] + [b"late"]

    run(scenario)


def test_frames_of_any_size_arrive_whole() -> None:
    async def scenario(echo: Echo) -> None:
        sizes = [1, LARGE - 1, LARGE, LARGE + 1, 20 << 20, 2]
        for size in sizes:
            echo.peer.link.send(bytes([size % 251]) * 3, bytes([size % 251]) * size)
        await echo.start()
        await until(lambda: len(echo.got) == len(sizes))
        assert echo.got == [bytes([size % 251]) * (size + 3) for size in sizes]

    run(scenario)


def test_the_sockets_file_is_gone_once_the_child_has_connected() -> None:
    async def scenario(echo: Echo) -> None:
        directory = Path(echo.peer.link.path).parent
        assert directory.stat().st_mode & 0o777 == 0o700
        await echo.start()
        echo.peer.link.send(b"hello")
        await until(lambda: echo.got == [b"hello"])
        assert not directory.exists()

    run(scenario)


def test_last_words_are_heard_before_the_end() -> None:
    async def scenario(echo: Echo) -> None:
        await echo.start()
        for number in range(100):
            echo.peer.link.send(str(number).encode())
        echo.peer.link.send(b"end")
        assert await echo.peer.exited == 0
        assert len(echo.got) == 100

    run(scenario)


def test_sending_to_a_child_that_is_gone_does_no_harm() -> None:
    async def scenario(echo: Echo) -> None:
        await echo.start()
        echo.peer.kill()
        await echo.peer.exited
        echo.peer.link.send(b"anybody?")
        await echo.peer.close()
        echo.peer.link.send(b"anybody?")
        assert not Path(echo.peer.link.path).parent.exists()

    run(scenario)


def test_a_long_path_for_temporary_files_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths of sockets have 107 bytes at most."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))

    async def scenario(echo: Echo) -> None:
        directory = Path(echo.peer.link.path).parent
        assert directory.parent != long
        await echo.start()
        echo.peer.link.send(b"hello")
        await until(lambda: echo.got == [b"hello"])
        assert not directory.exists()

    run(scenario)


def test_no_place_for_temporary_files_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(StartupError, match=r"/nowhere \(TMPDIR\): no such file"):
        RunDirectory()
