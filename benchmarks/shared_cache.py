"""Two replicas and one cache: what the cache saves, and what it costs when it is slow, gone, full or lies.

`python -m benchmarks.shared_cache [--items 150] [--json FILE]`. Each item goes to one replica and then, unchanged, to
the other; every answer is compared with that of a server without a shared cache. Exits 1 when an answer was wrong or
missing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load as load_safetensors

from benchmarks.processes import ServerProcess
from benchmarks.redis_server import Proxy, RedisServer
from encode_server.bench.client import LoadClient
from encode_server.bench.report import percentile
from encode_server.bench.source import LoadRequest, pool, request_of

TOLERANCE = 1e-4
WORKERS = 4
SIDE = 224


@dataclass
class Phase:
    """What came of the requests while the cache was in one state. Seconds; `first` and `second`: the replica that sees
    an item first, and the other."""

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    encoded: float = 0.0

    def document(self) -> dict[str, Any]:
        """For the table: milliseconds."""
        shown: dict[str, Any] = {"wrong": self.counts["wrong"], "lost": self.counts["lost"], "encoded": self.encoded}
        for name, times in (("first", self.first), ("second", self.second)):
            ordered = sorted(times)
            shown |= {f"{name}_p50_ms": percentile(ordered, 50) * 1e3, f"{name}_p99_ms": percentile(ordered, 99) * 1e3}
        return shown


class Run:
    """The servers, and what the embeddings have to be."""

    def __init__(self, items: int) -> None:
        self._items = items
        self._media = pool(str(SIDE))
        self._right: dict[str, np.ndarray[Any, Any]] = {}

    async def phase(self, first: ServerProcess, second: ServerProcess) -> Phase:
        """Every item to both."""
        phase = Phase()
        work = [self._request(index) for index in range(self._items)]
        clients = [LoadClient(server.url, keep_body=True, timeout_s=60) for server in (first, second)]
        before = sum(_encoded(server) for server in {first, second})

        async def worker() -> None:
            while work:
                request = work.pop()
                for client, times in zip(clients, (phase.first, phase.second), strict=True):
                    response, seconds = await client.send(request)
                    times.append(seconds)
                    phase.counts[self._judge(request, response.status, response.body)] += 1

        await asyncio.gather(*(worker() for _ in range(WORKERS)))
        for client in clients:
            client.close()
        phase.encoded = sum(_encoded(server) for server in {first, second}) - before
        return phase

    def _request(self, index: int) -> LoadRequest:
        medium = self._media[index % len(self._media)]
        return request_of([medium], key=medium.name + str(index % len(self._media)))

    def _judge(self, request: LoadRequest, status: int, body: bytes) -> str:
        if status != 200:
            return "lost"
        got = load_safetensors(body)["embedding"]
        want = self._right.setdefault(request.key, got)  # the first phase has no shared cache
        return "right" if got.shape == want.shape and float(np.abs(got - want).max()) <= TOLERANCE else "wrong"


def _encoded(server: ServerProcess) -> float:
    return server.look().total("encode_preprocessed_items_total")


def _flipped(piece: bytes) -> bytes:
    return piece[:-40] + bytes(byte ^ 255 for byte in piece[-40:-20]) + piece[-20:]


def _shuffled(pieces: list[bytes]) -> Callable[[bytes], bytes]:
    """Each answer is that of an earlier look-up, where the two are of one size."""

    def lie(piece: bytes) -> bytes:
        same = next((old for old in pieces if len(old) == len(piece)), piece)
        pieces.append(piece)
        return same

    return lie


async def measure(items: int, console: Console) -> dict[str, dict[str, Any]]:
    """All phases, in one run."""
    run, table = Run(items), {}
    options = ["--device=cpu", "--dtype=float32", "--cache-gb=0", "--log-level=error"]
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer("--maxmemory-policy", "noeviction"))
        proxy = stack.enter_context(Proxy(redis.port))

        def server(*more: str) -> ServerProcess:
            made = ServerProcess(["encode_server.cli", "serve", "demo", *options, *more])
            stack.callback(made.close)
            stack.callback(made.stop)
            return made

        async def phase(name: str, *pair: ServerProcess) -> None:
            with console.status(name):
                table[name] = (await run.phase(*pair)).document()

        alone = server()
        await phase("warm-up", alone, alone)
        await phase("no shared cache", alone, alone)
        one, other = (server(f"--shared-cache={proxy.url}") for _ in range(2))
        await phase("warm-up", one, other)
        await phase("works", one, other)
        proxy.delay_s = 0.02
        await phase("answers 20 ms later", one, other)
        proxy.delay_s = 0.5
        await phase("answers 500 ms later", one, other)
        proxy.delay_s = 0.0
        await _until_used(one, other)
        proxy.deaf = True
        await phase("says nothing", one, other)
        proxy.deaf = False
        await _until_used(one, other)
        proxy.lie = _flipped
        await phase("changes bytes", one, other)
        proxy.lie = _shuffled([])
        await phase("answers for another key", one, other)
        proxy.lie = bytes
        await _until_used(one, other)
        redis.cli("CONFIG", "SET", "maxmemory", "1")
        await phase("is full", one, other)
        redis.cli("CONFIG", "SET", "maxmemory", "0")
        await _until_used(one, other)
        killer = threading.Timer(0.5, redis.kill)
        killer.start()
        await phase("is killed on the way", one, other)
        killer.join()
        await phase("is gone", one, other)
        redis.start()
        await _until_used(one, other)
        await phase("is back", one, other)
        await phase("no shared cache, again", alone, alone)
    del table["warm-up"]
    return table


async def _until_used(*servers: ServerProcess) -> None:
    """Ask until the servers use the cache again."""
    media = pool(str(SIDE))
    client = {server: LoadClient(server.url, keep_body=True, timeout_s=60) for server in servers}
    for server in servers:
        for _ in range(600):
            look = server.look()
            if all(look.total("encode_shared_cache_up", operation=each) for each in ("get", "put")):
                break
            await client[server].send(request_of([media[0]], key="x"))
            await asyncio.sleep(0.1)
        client[server].close()


def show(console: Console, document: dict[str, dict[str, Any]]) -> None:
    """The table of docs/shared-cache.md."""
    table = Table(title=f"{SIDE}² images, {WORKERS} in progress; ms")
    table.add_column("the cache …")
    names = next(iter(document.values()))
    for name in names:
        table.add_column(name.replace("_ms", "").replace("_", " "), justify="right")
    for phase, figures in document.items():
        table.add_row(phase, *(f"{figures[name]:.0f}" for name in names))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.shared_cache", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--items", type=int, default=150)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=140)
    document = asyncio.run(measure(arguments.items, console))
    show(console, document)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2))
    return int(any(figures["wrong"] or figures["lost"] for figures in document.values()))


if __name__ == "__main__":
    sys.exit(main())
