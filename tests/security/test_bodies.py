"""Bodies are charged as they arrive, and have to arrive."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse

from encode_server.errors import EncodeError, TooBusy
from encode_server.pipeline.admission import Admission, AdmissionLimits
from encode_server.runtime import bodies
from encode_server.telemetry.metrics import Metrics
from tests.security.listener import app, listening
from tests.security.requests import encode, raw

MIB = 1 << 20
BODY = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n{"


def admission(mib=100, share=1.0):
    return Admission(AdmissionLimits(1000, mib * MIB, 1000, share))


async def reading(scope, receive, send):
    if scope["type"] == "lifespan":
        return await app(scope, receive, send)
    try:
        answer = PlainTextResponse(str(len(await bodies.read_all(Request(scope, receive), 1 << 20, 10_000))))
    except EncodeError as error:
        answer = PlainTextResponse(error.message, error.status)
    return await answer(scope, receive, send)


def test_a_body_has_a_least_rate(monkeypatch):
    monkeypatch.setattr(bodies, "GRACE_S", 0.3)
    with listening(application=reading) as listener, listener.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - began < 20 and b"408" not in (answer := _look(connection)):
                connection.sendall(b"x" * 100)
        assert answer.startswith(b"HTTP/1.1 408") and b"expected 10000 a second" in answer


def test_a_body_at_the_rate_takes_as_long_as_it_takes(monkeypatch):
    monkeypatch.setattr(bodies, "GRACE_S", 0.3)
    with listening(application=reading) as listener, listener.connect() as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        for _ in range(20):
            connection.sendall(b"x" * 5000)
            time.sleep(0.05)
        assert b"100000" in connection.recv(1000)


def _look(connection) -> bytes:
    connection.settimeout(0.1)
    try:
        return connection.recv(1000)
    except TimeoutError:
        return b""


def test_what_is_declared_keeps_nobody_out(server):
    """32 clients that declare as much as the server takes, and send one byte."""
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(raw(server)).sendall(BODY % (128 * MIB))
        assert [encode(server).status_code for _ in range(10)] == [200] * 10


@pytest.mark.parametrize("accept", ["application/openmetrics-text; version=9\xff", "text/plain;version=a.b.c"])
def test_metrics_are_given_whatever_the_version_asked_for(accept):
    assert b"encode_requests_in_progress" in Metrics().render(accept)[0]


def test_bodies_are_charged_as_they_grow():
    async def grow():
        gate = admission(100)
        with gate.admit("a", 90 * MIB) as first, gate.admit("b", 90 * MIB) as second:
            assert gate.held.bytes == 2 * MIB
            await first.grow(90 * MIB)
            assert gate.held.bytes == 91 * MIB
            with pytest.raises(TooBusy, match="MiB of media"):
                await second.grow(20 * MIB)
            first.settle(5 * MIB)
            await second.grow(20 * MIB)
        assert gate.held.bytes == 0

    asyncio.run(grow())


def test_one_client_cannot_grow_beyond_its_share_beside_others():
    async def grow():
        gate = admission(100, share=0.5)
        with gate.admit("a", 0) as first, gate.admit("a", 0) as second:
            await first.grow(30 * MIB)
            with gate.admit("b", 0) as other:
                with pytest.raises(TooBusy, match="share"):
                    await second.grow(30 * MIB)
                await other.grow(30 * MIB)

    asyncio.run(grow())


def test_patient_bodies_wait_for_room_and_never_for_each_other_alone():
    async def arrive(gate, sizes):
        async with gate.admit_patiently("a", 0, 10) as ticket:
            for size in sizes:
                await ticket.grow(size * MIB)
                await asyncio.sleep(0)

    async def all_of_them():
        gate = admission(100)
        most = 0

        async def watch():
            nonlocal most
            while True:
                most = max(most, gate.held.bytes)
                await asyncio.sleep(0)

        watcher = asyncio.create_task(watch())
        async with asyncio.timeout(10):
            await asyncio.gather(*(arrive(gate, [10] * 6) for _ in range(20)))
        watcher.cancel()
        assert gate.held.bytes == 0 and most <= 160 * MIB  # the bound and one body

    asyncio.run(all_of_them())
