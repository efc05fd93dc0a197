"""Load with faults: kills, hangs, crashes, poison, slow media, vanishing peers; every embedding is checked.

`python -m benchmarks.chaos --minutes 5 [--tp 2] [--json FILE]`. Exits 1 when an accepted request was lost or answered
with a wrong embedding, when a fault had an effect it should not have, or when something was left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import procfs
from benchmarks.expected import Expected
from benchmarks.monkeys import Monkeys
from benchmarks.outcomes import refused
from benchmarks.processes import ServerProcess
from benchmarks.small import slope
from encode_server.bench.client import LoadClient
from encode_server.bench.load import Load, run_load
from encode_server.bench.report import LoadReport, Result
from encode_server.bench.source import LoadRequest, pool, request_of
from encode_server.models.demo import demo_path

FAULTS = Path(__file__).parent / "faults"
MEDIA = ("112", "224", "448", "video", "audio")


@dataclass
class Ledger:
    """What became of the checked requests. `rejected` were told so before they were accepted."""

    outcomes: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)

    def enter(self, result: Result, expected: Expected) -> None:
        """Judge one answer."""
        status = result.response.status
        if result.ok:
            self.outcomes["delivered" if expected.right(result) else "wrong"] += 1
        elif refused(result.response):
            self.outcomes["rejected"] += 1
        else:
            self.outcomes["lost"] += 1
            self.lost[f"{status} {result.response.error or result.response.body[:120]!r}"] += 1


@dataclass
class Outages:
    """When the server was not ready, seen from outside."""

    seconds: list[float] = field(default_factory=list)
    slowest_probe_s: float = 0.0

    async def watch(self, url: str) -> None:
        """Ask `/readyz` and `/health` until cancelled."""
        down_since: float | None = None
        async with httpx.AsyncClient(timeout=30) as client:
            while True:
                started = time.perf_counter()
                await client.get(url + "/health")
                self.slowest_probe_s = max(self.slowest_probe_s, time.perf_counter() - started)
                ready = (await client.get(url + "/readyz")).status_code == 200
                if ready and down_since is not None:
                    self.seconds.append(time.perf_counter() - down_since)
                    down_since = None
                elif not ready and down_since is None:
                    down_since = time.perf_counter()
                await asyncio.sleep(0.05)


@dataclass
class Memory:
    """What the front holds, over time, and which files in /dev/shm its processes have used."""

    looks: list[tuple[float, float]] = field(default_factory=list)  # seconds, bytes
    shared: set[str] = field(default_factory=set)

    async def watch(self, pid: int) -> None:
        """Look every five seconds until cancelled."""
        while True:
            self.looks.append((time.monotonic(), procfs.rss_bytes(pid)))
            for process in (pid, *(process.pid for process in procfs.descendants(pid))):
                self.shared |= procfs.shared_memory(process)
            await asyncio.sleep(5)

    @property
    def mb_per_minute(self) -> float:
        """Slope over the last two thirds: at first pools and allocators still grow."""
        return slope(self.looks[len(self.looks) // 3 :]) * 60 / (1 << 20)


def mixed(expected: Expected, seed: int) -> Iterator[LoadRequest]:
    """Requests of every kind, each with a key that `expected` knows."""
    media = {what: pool(what, seed, count=3) for what in MEDIA}
    for what, copies in media.items():
        for index, medium in enumerate(copies):
            expected.learn(f"{what}:{index}", medium)
    choice = random.Random(seed)

    def stream() -> Iterator[LoadRequest]:
        while True:
            what = choice.choice(MEDIA)
            index = choice.randrange(len(media[what]))
            yield request_of([media[what][index]], key=f"{what}:{index}", fields=b'"timeout_s":110,')

    return stream()


async def run(server: ServerProcess, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The whole run against a server that is ready."""
    expected, ledger, outages, memory = Expected(demo_path()), Ledger(), Outages(), Memory()
    requests = mixed(expected, arguments.seed)
    client = LoadClient(server.url, keep_body=True, timeout_s=150)
    # A warm server is the baseline: pools, caches and allocators have grown by then.
    await run_load(client, itertools.islice(requests, 200), Load(8, seconds=60))
    before = _footprint(server)

    def enter(result: Result) -> None:
        ledger.enter(result, expected)

    seconds = arguments.minutes * 60
    monkeys = Monkeys(server.url, server.process.pid, arguments.seed)
    gap = min(20.0, seconds / 15)
    tasks = [
        asyncio.create_task(task)
        for task in (
            outages.watch(server.url),
            memory.watch(server.process.pid),
            monkeys.disasters(gap),
            monkeys.garbage(1.0),
            monkeys.crashes(gap / 4),
            monkeys.slow_media(2.0),
            monkeys.destinations(1.0),
            monkeys.leavers(0.5),
        )
    ]
    with console.status(f"chaos for {seconds:.0f} s"):
        load = asyncio.create_task(run_load(client, requests, Load(8, seconds=seconds), on_result=enter))
        await asyncio.sleep(seconds)
        for task in tasks[1:]:
            task.cancel()
        report = await load
        await _until_ready(server.url)
        overload = await _overload(server, requests, expected, ledger)
        tasks[0].cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
    await _until_quiet(server.url)
    client.close()
    document = _document(server, report, ledger, outages, monkeys, overload, before, _footprint(server))
    return document | {"rss_mb_per_minute": memory.mb_per_minute, "shared_memory": sorted(memory.shared)}


async def _overload(
    server: ServerProcess, requests: Iterator[LoadRequest], expected: Expected, ledger: Ledger
) -> dict[str, Any]:
    """Ten times the load, without faults: what is accepted is answered in bounded time, the rest is refused."""
    client = LoadClient(server.url, keep_body=True, timeout_s=150)
    report = await run_load(client, requests, Load(80, seconds=5), on_result=lambda r: ledger.enter(r, expected))
    client.close()
    return {
        "accepted": report.outcomes[200],
        "refused": report.outcomes[429] + report.outcomes[503],
        "p99_accepted_s": report.latency_s(99),
    }


def _footprint(server: ServerProcess) -> dict[str, float]:
    """What the front holds: its own memory, open files, room in the arena, requests."""
    pid = server.process.pid
    look = server.look()
    return {
        "front_rss_mb": procfs.rss_bytes(pid) / (1 << 20),
        "open_files": float(len(list(Path(f"/proc/{pid}/fd").iterdir()))),
        "arena_used_bytes": look.total("encode_arena_used_bytes"),
        "requests_in_progress": look.total("encode_requests_in_progress"),
    }


def _document(
    server: ServerProcess,
    report: LoadReport,
    ledger: Ledger,
    outages: Outages,
    monkeys: Monkeys,
    overload: dict[str, Any],
    before: dict[str, float],
    after: dict[str, float],
) -> dict[str, Any]:
    look = server.look()
    outcomes = ledger.outcomes
    return {
        "accepted": outcomes["delivered"] + outcomes["wrong"] + outcomes["lost"],
        "delivered": outcomes["delivered"],
        "wrong": outcomes["wrong"],
        "lost": outcomes["lost"],
        "rejected": outcomes["rejected"],
        "replayed_items": look.total("encode_replayed_items_total"),
        "group_restarts": look.total("encode_group_restarts_total"),
        "preparer_restarts": look.total("encode_preparer_restarts_total"),
        "items_prepared_again": look.total("encode_prepared_again_items_total"),
        "recover_s": {"median": sorted(outages.seconds)[len(outages.seconds) // 2], "max": max(outages.seconds)}
        if outages.seconds
        else {},
        "slowest_health_s": outages.slowest_probe_s,
        "overload": overload,
        "faults": dict(monkeys.counts),
        "surprises": dict(monkeys.surprises),
        "lost_reasons": dict(ledger.lost),
        "items_per_s": report.items_per_s,
        "before": before,
        "after": after,
    }


async def _until_ready(url: str) -> None:
    async with httpx.AsyncClient(timeout=30) as client:
        for _ in range(1200):
            if (await client.get(url + "/readyz")).status_code == 200:
                return
            await asyncio.sleep(0.1)


async def _until_quiet(url: str) -> None:
    """Wait for what is still in flight for callers that have gone, at most half a minute."""
    async with httpx.AsyncClient(timeout=30) as client:
        for _ in range(300):
            text = (await client.get(url + "/metrics")).text
            if "encode_requests_in_progress 0.0" in text and "encode_arena_used_bytes 0.0" in text:
                return
            await asyncio.sleep(0.1)


def show(console: Console, document: dict[str, Any]) -> None:
    """The table."""
    table = Table(title="What it survived")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name, value in document.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for key, entry in entries:
            text = f"{entry:.2f}" if isinstance(entry, float) and entry % 1 else f"{entry:.0f}"
            table.add_row(f"{name.replace('_', ' ')} {key.replace('_', ' ')}".strip(), text)
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.chaos", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console()
    faults = {"PYTHONPATH": os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")])}
    options = ["--device=cpu", "--dtype=float32", f"--tp={arguments.tp}", "--stall-s=6", "--max-restarts=1000"]
    options += ["--media-allow=127.0.0.1", "--fetch-s=2", "--send-timeout-s=3", "--cache-gb=0", "--log-level=error"]
    options += ["--max-requests=64", "--client-share=1"]
    server = ServerProcess(["encode_server.cli", "serve", "demo", *options], threads=1, environment=faults)
    try:
        document = uvloop.run(run(server, arguments, console))
    finally:
        server.stop()
        log = server.log()
        server.close()
        if server.process.returncode:
            console.print(log[-4000:], markup=False)
    left = sum((Path("/dev/shm") / name).exists() for name in document.pop("shared_memory"))
    document |= {"shared_memory_left_behind": left, "stop_s": server.stop_s, "exit_status": server.process.returncode}
    show(console, document)
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2))
    after = document["after"]
    sound = (
        document["lost"] == document["wrong"] == 0
        and not document["surprises"]
        and after["arena_used_bytes"] == after["requests_in_progress"] == 0
        and document["shared_memory_left_behind"] == 0
        and after["open_files"] <= document["before"]["open_files"] + 16
        and document["exit_status"] == 0
        # A few minutes say nothing about a slope.
        and (arguments.minutes < 10 or document["rss_mb_per_minute"] < 1)
    )
    console.print("[bold]sound[/bold]" if sound else "[bold red]not sound[/bold red]")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
