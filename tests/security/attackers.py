"""Strangers, each in a process of its own: `python -m tests.security.attackers NAME PORT MEDIA_PORT SEED`.

`nothing PORT` is the listener that they are compared against: it reads, and answers each request alike. `media PORT` is
the strangers' media server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.media.web_server import web_server
from tests.security.requests import item

STRANGER = "127.0.0.3"


class Target:
    """The server, and a media server that behaves badly."""

    def __init__(self, port: int, media_port: int) -> None:
        self.port, self.media_port = port, media_port

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10, source_address=(STRANGER, 0))

    def post(self, body: bytes) -> None:
        with self.connect() as connection:
            _send(connection, body)
            connection.settimeout(30)
            connection.recv(1000)


def _send(connection: socket.socket, body: bytes) -> None:
    connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def headers(target: Target, rng: random.Random) -> None:
    with target.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(rng.randrange(4000)):
            connection.sendall(rng.choice([b"a: b\r\n" * 200, b"X" * 4000]))


def pipelined(target: Target, rng: random.Random) -> None:
    with target.connect() as connection:
        for _ in range(200):
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)


def declared(target: Target, rng: random.Random) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            head = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 134217728\r\n\r\n{"
            stack.enter_context(target.connect()).sendall(head)
        time.sleep(rng.random() * 8)


def large(target: Target, rng: random.Random) -> None:
    """An answer of some 60 MB that is read slowly, or not."""
    body = json.dumps({"modality": "image", "mm_items": [item(784, 784, 1)] * rng.choice([60, 256])}).encode()
    with target.connect() as connection:
        _send(connection, body)
        for _ in range(rng.randrange(40)):
            connection.recv(10_000)
            time.sleep(0.1)


def idle(target: Target, rng: random.Random) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(target.connect())
        time.sleep(rng.random() * 2)


def bodies(target: Target, rng: random.Random) -> None:
    with target.connect() as connection:
        connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 134217728\r\n\r\n")
        piece = bytes(1 << 20)
        for _ in range(128):
            connection.sendall(piece)


def strings(target: Target, rng: random.Random) -> None:
    long = b"u" * 20_000_000
    target.post(b'{"modality": "image", "mm_items": [{"url": "AAAA", "uuid": "' + long + b'"}]}')


def fetches(target: Target, rng: random.Random) -> None:
    urls = [
        f"http://127.0.0.1:{target.media_port}/{rng.choice(['trickle', 'endless', 'silence'])}/{n}" for n in range(100)
    ]
    target.post(json.dumps({"modality": "image", "mm_items": urls, "timeout_s": 10}).encode())


ATTACKS = {what.__name__: what for what in (headers, pipelined, declared, large, idle, bodies, strings, fetches)}


class _Nothing(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if b"\r\n\r\n" in data:
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


async def nothing(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(_Nothing, "127.0.0.1", port)
    await server.serve_forever()


@contextlib.contextmanager
def attacked(port: int, media_port: int, only: list[str] | None = None) -> Iterator[None]:
    """All strangers at work meanwhile."""
    with contextlib.ExitStack() as stack:
        for seed, name in enumerate(ATTACKS if only is None else only):
            stack.enter_context(_process(name, str(port), str(media_port), str(seed)))
        yield


@contextlib.contextmanager
def listener_of_nothing() -> Iterator[int]:
    """The port of a listener that costs as little as any."""
    with _listener("nothing") as port:
        yield port


@contextlib.contextmanager
def media_server() -> Iterator[int]:
    """The port of a stranger's media server, a `WebServer` in a process of its own."""
    with _listener("media") as port:
        yield port


@contextlib.contextmanager
def _listener(name: str) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with _process(name, str(port)):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield port


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-m", "tests.security.attackers", *arguments])
    try:
        yield
    finally:
        process.kill()
        process.wait(10)


def main() -> None:
    name, port, *rest = sys.argv[1:]
    # A stranger computes on a machine of its own. Here it takes only what the server and the honest leave of the cores,
    # so that what the honest notice is what the server does for strangers.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    if name == "nothing":
        asyncio.run(nothing(int(port)))
        return
    if name == "media":
        with web_server(int(port)) as web:
            web.over.wait()
    target, rng = Target(int(port), int(rest[0])), random.Random(int(rest[1]))
    while True:
        with contextlib.suppress(OSError):
            ATTACKS[name](target, rng)
        time.sleep(0.2)


if __name__ == "__main__":
    main()
