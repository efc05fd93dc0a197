"""Telling bootstraps where the encoder is."""

import asyncio
import time

import pytest

from encode_server.delivery.sglang import announcer as discovery
from encode_server.delivery.sglang.announcer import Announcer, advertised_host
from encode_server.errors import StartupError
from tests.server.prefill_standin import Bootstrap


async def until(condition, timeout_s: float = 30):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(discovery, "CHECK_S", 0.1)
    monkeypatch.setattr(discovery, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(discovery, "WITHDRAW_S", 10.0)


def test_only_while_ready_and_again_when_forgotten():
    async def scenario():
        ready = False
        with Bootstrap() as bootstrap:
            announcer = Announcer([bootstrap.url + "/"], "http", "encoder-0", lambda: ready)
            announcer.start(8443)
            await asyncio.sleep(0.2)
            assert not bootstrap.seen
            ready = True
            await until(lambda: bootstrap.urls == ["http://encoder-0:8443"])
            bootstrap.urls.clear()
            await until(lambda: bootstrap.urls == ["http://encoder-0:8443"])
            ready = False
            await asyncio.sleep(0.2)
            bootstrap.urls.clear()
            await asyncio.sleep(0.3)
            assert not bootstrap.urls  # whoever evicts one that is not ready is right
            bootstrap.urls.append("http://encoder-0:8443")
            await announcer.aclose()
            assert bootstrap.seen[-1][1] == "unregister" and not bootstrap.urls

    asyncio.run(scenario())


def test_one_that_is_down_holds_back_neither_the_others_nor_the_end():
    async def scenario():
        with Bootstrap() as gone:
            port = gone.port
        with Bootstrap() as bootstrap:
            announcer = Announcer([f"http://127.0.0.1:{port}", bootstrap.url], "https", "::1", lambda: True)
            announcer.start(1)
            await until(lambda: bootstrap.urls == ["https://[::1]:1"])
            await asyncio.wait_for(announcer.aclose(), 9)
            assert not bootstrap.urls

    asyncio.run(scenario())


def test_a_wildcard_address_becomes_the_one_towards_the_bootstrap():
    async def scenario():
        with Bootstrap() as bootstrap:
            announcer = Announcer([bootstrap.url], "http", advertised_host(None, "0.0.0.0"), lambda: True)
            announcer.start(7)
            await until(lambda: bootstrap.urls == ["http://127.0.0.1:7"])
            await announcer.aclose()

    asyncio.run(scenario())


def test_advertised_host():
    assert advertised_host(None, "10.0.0.1") == "10.0.0.1"
    assert advertised_host(None, "::") is None
    assert advertised_host(None, "encoder.internal") == "encoder.internal"
    assert advertised_host("a.b", "0.0.0.0") == "a.b"


@pytest.mark.parametrize("url", ["10.0.0.7:8998", "ftp://x", "http://", "http://x:port"])
def test_what_is_no_url_is_said_at_start(url):
    with pytest.raises(StartupError, match="--register-url"):
        Announcer([url], "http", None, lambda: True)
