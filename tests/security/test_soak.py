"""Honest load beside strangers who try everything, with a bound on memory: `-m soak`, `SOAK_S` seconds (600)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from encode_server.memory import worst_case
from encode_server.settings import load_settings
from tests.live import LiveServer
from tests.media.web_server import web_server
from tests.security.requests import item, raw

OPTIONS = {
    "max_inflight_mb": "512",
    "undelivered_mb": "128",
    "max_answer_mb": "64",
    "cache_gb": "0.25",
    "arena_mb": "256",
    "preproc_processes": "1",
    "preproc_memory_mb": "1536",
    "max_connections": "512",
    "send_timeout_s": "5",
}
STRANGER, HONEST = "127.0.0.3", "127.0.0.2"


def _connect(server: LiveServer) -> socket.socket:
    host, port = server.base_url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10, source_address=(STRANGER, 0))


def _headers(server: LiveServer, rng: random.Random) -> None:
    with _connect(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for _ in range(rng.randrange(4000)):
            connection.sendall(rng.choice([b"a: b\r\n" * 200, b"X" * 4000]))


def _pipelined(server: LiveServer, rng: random.Random) -> None:
    with _connect(server) as connection:
        for _ in range(200):
            connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100)


def _declared(server: LiveServer, rng: random.Random) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            head = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 134217728\r\n\r\n{"
            stack.enter_context(_connect(server)).sendall(head)
        time.sleep(rng.random() * 8)


def _large(server: LiveServer, rng: random.Random) -> None:
    """An answer of some 60 MB that is read slowly, or not."""
    body = json.dumps({"modality": "image", "mm_items": [item(784, 784, 1)] * rng.choice([60, 256])}).encode()
    with _connect(server) as connection:
        connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        for _ in range(rng.randrange(40)):
            connection.recv(10_000)
            time.sleep(0.1)


def _idle(server: LiveServer, rng: random.Random) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(_connect(server))
        time.sleep(rng.random() * 2)


def _bodies(server: LiveServer, rng: random.Random) -> None:
    with _connect(server) as connection:
        connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 134217728\r\n\r\n")
        for _ in range(128):
            connection.sendall(bytes(1 << 20))


def _strings(server: LiveServer, rng: random.Random) -> None:
    transport = httpx.HTTPTransport(local_address=STRANGER)
    with httpx.Client(transport=transport, timeout=30) as client:
        fields = {"modality": "image", "mm_items": [{"url": "AAAA", "uuid": "u" * 20_000_000}]}
        client.post(server.base_url + "/encode", json=fields)


def _fetches(port: int) -> Callable[[LiveServer, random.Random], None]:
    def fetch(server: LiveServer, rng: random.Random) -> None:
        urls = [f"http://127.0.0.1:{port}/{rng.choice(['trickle', 'endless', 'silence'])}/{n}" for n in range(100)]
        transport = httpx.HTTPTransport(local_address=STRANGER)
        with httpx.Client(transport=transport, timeout=30) as client:
            client.post(server.base_url + "/encode", json={"modality": "image", "mm_items": urls, "timeout_s": 10})

    return fetch


def _resident(server: LiveServer) -> int:
    """Proportional bytes of all processes of the server."""
    total = 0
    for pid in (server.front_pid(), server.forkserver_pid(), *server.preparer_pids()):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


class _Honest:
    """One request after the other, from an address of its own."""

    def __init__(self, server: LiveServer) -> None:
        self._server = server
        self.seconds: list[float] = []
        self.lost: list[str] = []

    def run(self, seconds: float, seed: int) -> float:
        """For so long; the 99th percentile."""
        self.seconds.clear()
        ends = time.monotonic() + seconds
        transport = httpx.HTTPTransport(local_address=HONEST)
        with httpx.Client(transport=transport, timeout=30) as client:
            number = 0
            while time.monotonic() < ends:
                number += 1
                fields = {"modality": "image", "mm_items": [item(56 + number % 50, 56 + number // 50 % 50, seed)]}
                began = time.monotonic()
                answer = client.post(self._server.base_url + "/encode", json=fields)
                self.seconds.append(time.monotonic() - began)
                if answer.status_code != 200:
                    self.lost.append(answer.text)
                time.sleep(0.02)
        return statistics.quantiles(self.seconds, n=100)[98]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_honest_clients_beside_strangers(checkpoint, tmp_path):
    seconds = float(os.environ.get("SOAK_S", "600"))
    bound = sum(part.nbytes for part in worst_case(load_settings(OPTIONS))) // 2
    options = [text for name, value in OPTIONS.items() for text in ("--" + name.replace("_", "-"), value)]
    with LiveServer(checkpoint, tmp_path / "s", *options, "--media-allow", "127.0.0.1") as live, web_server() as web:
        server, over = live.healthy(), threading.Event()
        honest = _Honest(server)
        alone = honest.run(min(10, seconds / 4), 1)
        attacks = [_headers, _pipelined, _declared, _large, _idle, _bodies, _strings, _fetches(web.port)]

        def attack(what: Callable[[LiveServer, random.Random], None], seed: int) -> None:
            rng = random.Random(seed)
            while not over.is_set():
                with contextlib.suppress(OSError, httpx.HTTPError):
                    what(server, rng)
                time.sleep(0.2)

        threads = [threading.Thread(target=attack, args=(what, n), daemon=True) for n, what in enumerate(attacks)]
        most = 0

        def watch() -> None:
            nonlocal most
            while not over.wait(0.5):
                most = max(most, _resident(server))

        threads.append(threading.Thread(target=watch, daemon=True))
        for thread in threads:
            thread.start()
        beside = honest.run(seconds, 2)
        over.set()
        print(
            f"\nhonest p99 {alone * 1000:.0f} ms alone, {beside * 1000:.0f} ms beside strangers, {len(honest.seconds)} "
            f"requests, {len(honest.lost)} lost; at most {most >> 20} MiB of {bound >> 20}"
        )
        assert not honest.lost, honest.lost[:3]
        assert server.process.poll() is None and most < bound
        for thread in threads:
            thread.join(60)
        with raw(server) as connection:
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
