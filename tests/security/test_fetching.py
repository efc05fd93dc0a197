"""Names that nobody answers for, media servers without end, and clients that take all places."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from encode_server.delivery.destinations import DestinationPolicy
from encode_server.errors import BadMedia, DeliveryFailed
from encode_server.media.limits import MediaLimits
from encode_server.media.sources import MediaSource
from encode_server.runtime import resolving
from encode_server.runtime.resolving import Resolver
from encode_server.runtime.slots import FairSlots
from tests.media.web_server import web_server


def test_places_are_shared_fairly():
    async def check():
        slots = FairSlots(4, 0.5)
        for _ in range(2):
            await slots.acquire("greedy")
        waiting = [asyncio.create_task(slots.acquire("greedy")) for _ in range(5)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting), "half of the places are the most of one client"
        async with asyncio.timeout(1), slots.hold("modest"), slots.hold("modest"):
            waiting[0].cancel()
            await asyncio.sleep(0)
        for _ in range(2):
            slots.release("greedy")
            await asyncio.sleep(0)
        assert [task.done() for task in waiting] == [True, True, True, False, False]
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for _ in range(2):
            slots.release("greedy")
        async with asyncio.timeout(1), slots.hold("a"), slots.hold("a"), slots.hold("b"), slots.hold("b"):
            pass

    asyncio.run(check())


@pytest.fixture
def silent(monkeypatch):
    """A name server that says nothing about any name but localhost."""
    over = threading.Event()
    real = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        if host != "localhost":
            over.wait(60)
        return real(host, *args, **kwargs)

    monkeypatch.setattr(resolving.socket, "getaddrinfo", getaddrinfo)
    yield
    over.set()


def test_a_silent_name_server_delays_only_who_asks_it(silent):
    async def check():
        policy = DestinationPolicy([])
        policy._resolver = Resolver(8, 0.5, limit_s=0.5)
        began = time.monotonic()
        stuck = [asyncio.create_task(policy.endpoint(f"x{n}.invalid", 1, client="a")) for n in range(32)]
        await asyncio.sleep(0.01)
        assert await policy.endpoint("localhost", 1, client="b") == "tcp://127.0.0.1:1"
        assert await policy.endpoint("127.0.0.1", 1, client="a") == "tcp://127.0.0.1:1"
        ends = await asyncio.gather(*stuck, return_exceptions=True)
        assert {type(end) for end in ends} == {DeliveryFailed} and time.monotonic() - began < 10

    began = time.monotonic()
    asyncio.run(check())
    assert time.monotonic() - began < 10, "the end waits for the name server"


def fetcher(body):
    async def run():
        with ThreadPoolExecutor(2) as pool:
            source = MediaSource(["127.0.0.1"], [], MediaLimits(fetch_seconds=3), pool)
            try:
                await body(source)
            finally:
                await source.aclose()

    asyncio.run(run())


def test_informational_responses_without_end_are_an_error():
    """And others have their turn meanwhile."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(10_000)
            while True:
                connection.sendall(b"HTTP/1.1 102 Processing\r\n\r\n" * 1000)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    async def body(source):
        turns = 0

        async def turn():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(turn())
        began = time.monotonic()
        with pytest.raises(BadMedia, match="cannot be fetched"):
            await source.fetch(f"http://127.0.0.1:{port}/x")
        assert time.monotonic() - began < 20 and turns > 10
        beside.cancel()

    fetcher(body)
    listener.close()


def test_who_fetches_slowly_takes_no_others_places(monkeypatch):
    from encode_server.media import web as module

    monkeypatch.setattr(module, "MAX_FETCHES", 8)
    with web_server() as web:
        url = f"http://127.0.0.1:{web.port}"

        async def body(source):
            slow = [asyncio.create_task(source.fetch(f"{url}/trickle", client="greedy")) for _ in range(30)]
            await asyncio.sleep(0.1)
            async with asyncio.timeout(1.5):
                assert await source.fetch(f"{url}/ok", client="modest")
            for task in slow:
                task.cancel()
            await asyncio.gather(*slow, return_exceptions=True)

        fetcher(body)
