"""What a server with several groups of ranks (--dp) loses with one of them: work, which must be none, and rate.

`python -m benchmarks.groups [--seconds 8] [--json FILE]`. Each rank takes a fixed time for an item, as a device would,
and no core: on a few cores groups of real encoders would compete, and the loss of one would not show. One group of
three is killed under load, another is stopped, and one cannot start. The exit status is 1 when an accepted request was
lost, or when the server was not ready or not healthy although two groups worked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import procfs
from benchmarks.instant_rank import BROKEN_VARIABLE, DTYPE_VARIABLE, ITEM_VARIABLE, LOAD_VARIABLE, WIDTH_VARIABLE
from benchmarks.outcomes import Tally
from benchmarks.processes import ServerProcess, server
from encode_server.bench.client import LoadClient
from encode_server.bench.source import LoadRequest, requests
from encode_server.models.demo import write_demo

GROUPS = 3
AT_A_TIME = 24
GIVE_UP_S = 120.0
LOOK_S = 0.1


@dataclass
class Phase:
    """A part of the run. Rates are in items per second; `rates`: of each group, from the metrics."""

    what: str
    seconds: float
    rate: float
    note: str = ""


@dataclass
class Watched:
    """A server under load, and what was seen of it."""

    process: ServerProcess
    client: httpx.AsyncClient
    broken: Path
    tally: Tally = field(default_factory=Tally)
    bad: set[str] = field(default_factory=set)  # answers of probes that should have been good
    phases: list[Phase] = field(default_factory=list)

    async def groups(self) -> dict[str, dict[str, Any]]:
        """What `/health` says of each group. The whole must be healthy, and ready."""
        health, ready = await asyncio.gather(self.client.get("/health"), self.client.get("/readyz"))
        for name, answer in (("/health", health), ("/readyz", ready)):
            if answer.status_code != 200:
                self.bad.add(f"{name}: {answer.json().get('reason')}")
        document: dict[str, dict[str, Any]] = health.json()["groups"]
        return document

    async def until(self, group: int, *, ready: bool) -> float:
        """Seconds until the group is ready, or is not."""
        started = time.perf_counter()
        while ((await self.groups())[str(group)]["engine"] == "ready") is not ready:
            if time.perf_counter() - started > GIVE_UP_S:
                raise RuntimeError(f"group {group} is not {'ready' if ready else 'lost'} after {GIVE_UP_S:g} s")
            await asyncio.sleep(LOOK_S)
        return time.perf_counter() - started

    def hit(self, group: int, what: signal.Signals) -> None:
        """Send a signal to the rank of the group."""
        (pid,) = [p.pid for p in procfs.descendants(self.process.process.pid) if p.name == f"rank {group}.0"]
        os.kill(pid, what)

    async def phase(self, what: str, body: Callable[[], Awaitable[str]]) -> None:
        """Do something, and count what was answered meanwhile. The body returns a note."""
        before, started = self.tally.counts["answered"], time.perf_counter()
        note = await body()
        seconds = time.perf_counter() - started
        self.phases.append(Phase(what, seconds, (self.tally.counts["answered"] - before) / seconds, note))


@contextlib.asynccontextmanager
async def loaded(process: ServerProcess, broken: Path) -> AsyncIterator[Watched]:
    """The server with `AT_A_TIME` requests in progress all the time; afterwards all of them have ended."""
    ends = asyncio.Event()
    sender = LoadClient(process.url, timeout_s=GIVE_UP_S)
    source = requests(("56",))
    async with httpx.AsyncClient(base_url=process.url, timeout=30) as client:
        watched = Watched(process, client, broken)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_A_TIME):
                tasks.create_task(_ask(sender, source, watched.tally, ends.is_set))
            try:
                yield watched
            finally:
                ends.set()
    sender.close()


async def _ask(client: LoadClient, source: Iterator[LoadRequest], tally: Tally, ended: Callable[[], bool]) -> None:
    while not ended():
        response, _ = await client.send(next(source))
        if tally.enter(response) != "answered":
            await asyncio.sleep(0.2)


async def run(process: ServerProcess, broken: Path, seconds: float) -> dict[str, Any]:
    """All of it, on a server that is ready."""
    async with loaded(process, broken) as watched:
        for group in range(GROUPS):
            await watched.until(group, ready=True)
        await asyncio.sleep(seconds / 2)  # costs are learnt

        async def steady() -> str:
            await asyncio.sleep(seconds)
            return ""

        async def killed() -> str:
            watched.hit(1, signal.SIGKILL)
            await watched.until(1, ready=False)
            return f"back after {await watched.until(1, ready=True):.1f} s"

        async def stopped() -> str:
            watched.hit(2, signal.SIGSTOP)
            found_s = await watched.until(2, ready=False)
            return f"found after {found_s:.1f} s, back {await watched.until(2, ready=True):.1f} s later"

        async def cannot_start() -> str:
            watched.broken.write_text("0")
            watched.hit(0, signal.SIGKILL)
            await watched.until(0, ready=False)
            await asyncio.sleep(seconds)
            restarts = (await watched.groups())["0"]["restarts"]
            return f"started {restarts} times in vain"

        async def mended() -> str:
            watched.broken.unlink()
            return f"back after {await watched.until(0, ready=True):.1f} s"

        await watched.phase("three groups", steady)
        await watched.phase("one is killed, until it is back", killed)
        await watched.phase("three groups again", steady)
        await watched.phase("one is stopped (SIGSTOP), until it is back", stopped)
        await watched.phase("one cannot start", cannot_start)
        await watched.phase("until it can", mended)
        await watched.phase("three groups in the end", steady)
    return {
        "phases": [vars(phase) for phase in watched.phases],
        "requests": dict(watched.tally.counts),
        "lost_reasons": dict(watched.tally.reasons),
        "bad_probes": sorted(watched.bad),
    }


def show(console: Console, found: dict[str, Any]) -> None:
    """The table."""
    table = Table(title=f"{GROUPS} groups, {AT_A_TIME} requests at a time", min_width=100)
    for column in ("what", "seconds", "items/s", "of three groups'", ""):
        table.add_column(column, justify="right" if column in ("seconds", "items/s", "of three groups'") else "left")
    whole = found["phases"][0]["rate"]
    for phase in found["phases"]:
        share = f"{phase['rate'] / whole:.2f}"
        table.add_row(phase["what"], f"{phase['seconds']:.1f}", f"{phase['rate']:.1f}", share, phase["note"])
    console.print(table)
    counts = found["requests"]
    console.print(
        f"Requests: {counts.get('answered', 0)} answered, {counts.get('refused', 0)} refused, "
        f"{counts.get('lost', 0)} lost. Bad answers of /health and /readyz: {len(found['bad_probes'])}."
    )
    for reason in (*found["lost_reasons"], *found["bad_probes"]):
        console.print(reason)


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.groups", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each phase that has no end of its own [8]")
    parser.add_argument("--item-s", type=float, default=0.05, help="that an item takes a rank [0.05]")
    parser.add_argument("--load-s", type=float, default=6.0, help="that a rank takes to load [6]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, broken = Path(folder) / "checkpoint", Path(folder) / "broken"
        write_demo(checkpoint)
        command = ["benchmarks.instant_server", "serve", str(checkpoint), "--device=cpu", "--cache-gb=0"]
        command += [f"--dp={GROUPS}", "--log-level=error"]
        environment = {
            WIDTH_VARIABLE: "128",
            DTYPE_VARIABLE: "float32",
            ITEM_VARIABLE: str(args.item_s),
            LOAD_VARIABLE: str(args.load_s),
            BROKEN_VARIABLE: str(broken),
        }
        with server(command, environment=environment) as process:
            found = uvloop.run(run(process, broken, args.seconds))
    show(console, found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if not found["requests"].get("lost") and not found["bad_probes"] else 1


if __name__ == "__main__":
    sys.exit(main())
