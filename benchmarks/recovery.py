"""How soon a server is itself again after a process was lost, and how soon a hang is found.

`python -m benchmarks.recovery [--kills 20] [--json FILE]`. The demo is under load all the time. Ranks, preparers and
the forkserver are killed, each a second after the server has recovered from the last kill. Then a rank is stopped,
alone and beside busy loops on all cores. Last, busy loops starve the server, which must not be taken for a hang. The
exit status is 1 when an accepted request was lost, or a process that was only starved.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks import procfs
from benchmarks.outcomes import Tally
from benchmarks.processes import ServerProcess, server
from benchmarks.prometheus import Look
from encode_server.bench.client import LoadClient
from encode_server.bench.source import LoadRequest, requests

AT_A_TIME = 8
PAUSE_S = 1.0  # from a recovery to the next kill
COME_AGAIN_S = 0.2  # a caller that is refused waits, or eight of them would take the cores that the recovery needs
LEARN_S = 5.0  # under load before a rank is stopped: the front learns what a batch takes
GIVE_UP_S = 120.0
KINDS = {"forkserver", "preparer", "rank"}
MEDIA = ("112", "224", "audio")


@dataclass
class Patient:
    """A server under load, and what it takes to look at it."""

    process: ServerProcess
    client: httpx.AsyncClient
    tally: Tally = field(default_factory=Tally)

    @property
    def front(self) -> int:
        """The front's process."""
        return self.process.process.pid

    async def look(self) -> Look:
        """The metrics now."""
        return Look.parse((await self.client.get("/metrics")).text)

    async def restarts(self) -> float:
        """Of rank groups and preparers, so far."""
        look = await self.look()
        return look.total("encode_group_restarts_total") + look.total("encode_preparer_restarts_total")

    async def whole(self) -> bool:
        """Whether requests are taken and every preparer can work."""
        if (await self.client.get("/readyz")).status_code != 200:
            return False
        ups = [value for (name, _), value in (await self.look()).samples.items() if name == "encode_preparer_up"]
        return bool(ups) and all(ups)

    async def hit(self, kind: str, what: signal.Signals) -> set[int]:
        """Send a signal to the first process of a kind; that process, and those which cannot live without it."""
        pid = procfs.of_kind(self.front, kind)[0]
        hit = {pid} | {process.pid for process in procfs.descendants(pid)}
        os.kill(pid, what)
        return hit

    async def until_replaced(self, lost: set[int]) -> float:
        """Seconds until other processes are there in place of the lost ones, and all is whole."""
        started = time.perf_counter()
        while time.perf_counter() - started < GIVE_UP_S:
            there = procfs.descendants(self.front)
            # The front starts another process only after it has noticed the loss: from then on its word counts.
            replaced = lost.isdisjoint(process.pid for process in there)
            if replaced and {process.kind for process in there} >= KINDS and await self.whole():
                return time.perf_counter() - started
            await asyncio.sleep(0.005)
        raise RuntimeError(f"the server has not recovered after {GIVE_UP_S:g} s")


async def kills(patient: Patient, kind: str, count: int) -> list[float]:
    """Kill a process of the kind so many times; the seconds of each recovery."""
    seconds = []
    for _ in range(count):
        await asyncio.sleep(PAUSE_S)
        seconds.append(await patient.until_replaced(await patient.hit(kind, signal.SIGKILL)))
    return seconds


async def hang(patient: Patient) -> float:
    """Stop a rank; the seconds until the server has found out and ended it."""
    await asyncio.sleep(LEARN_S)
    started = time.perf_counter()
    stopped = await patient.hit("rank", signal.SIGSTOP)
    while not stopped.isdisjoint(procfs.ranks(patient.front)):
        if time.perf_counter() - started > GIVE_UP_S:
            raise RuntimeError(f"a stopped rank was not found within {GIVE_UP_S:g} s")
        await asyncio.sleep(0.02)
    found_s = time.perf_counter() - started
    await patient.until_replaced(stopped)
    return found_s


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that want a core all the time."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


@contextlib.asynccontextmanager
async def loaded(process: ServerProcess) -> AsyncIterator[Patient]:
    """The server with `AT_A_TIME` requests in progress all the time; afterwards all of them have ended."""
    ends = asyncio.Event()
    sender = LoadClient(process.url, timeout_s=GIVE_UP_S)
    source = requests(MEDIA)
    async with httpx.AsyncClient(base_url=process.url, timeout=30) as client:
        patient = Patient(process, client)
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_A_TIME):
                group.create_task(_ask(sender, source, patient.tally, ends.is_set))
            try:
                yield patient
            finally:
                ends.set()
    sender.close()


async def _ask(client: LoadClient, source: Iterator[LoadRequest], tally: Tally, ended: Callable[[], bool]) -> None:
    while not ended():
        response, _ = await client.send(next(source))
        if tally.enter(response) != "answered":
            await asyncio.sleep(COME_AGAIN_S)


async def run(process: ServerProcess, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All of it, on a server that is ready."""
    cores = len(os.sched_getaffinity(0))
    found: dict[str, Any] = {"cores": cores, "kills": {}, "hang_s": {}}
    async with loaded(process) as patient:
        await asyncio.sleep(LEARN_S)
        for kind, count in (("rank", args.kills), ("preparer", args.kills), ("forkserver", min(1, args.kills))):
            with console.status(f"killing: {kind}"):
                found["kills"][kind] = await kills(patient, kind, count)
        for what, loops in (("alone", 0), (f"beside {cores} busy loops", cores)):
            with console.status(f"a rank hangs, {what}"), busy_loops(loops):
                found["hang_s"][what] = await hang(patient)
        with console.status("a starved machine"), busy_loops(2 * cores):
            before = await patient.restarts()
            await asyncio.sleep(args.starve_s)
            found["starved"] = {
                "loops": 2 * cores,
                "seconds": args.starve_s,
                "restarts": await patient.restarts() - before,
            }
    return found | {"requests": dict(patient.tally.counts), "lost_reasons": dict(patient.tally.reasons)}


def show(console: Console, found: dict[str, Any]) -> None:
    """The table."""
    table = Table(title=f"Seconds, {AT_A_TIME} requests at a time on {found['cores']} cores", min_width=100)
    for column in ("what", "times", "median", "least", "most"):
        table.add_column(column, justify="right" if column != "what" else "left")
    rows = {f"{kind} killed, until all works again": seconds for kind, seconds in found["kills"].items() if seconds}
    rows |= {f"rank stopped, until that is found, {what}": [seconds] for what, seconds in found["hang_s"].items()}
    for what, seconds in rows.items():
        figures = (statistics.median(seconds), min(seconds), max(seconds))
        table.add_row(what, str(len(seconds)), *(f"{figure:.2f}" for figure in figures))
    console.print(table)
    starved, counts = found["starved"], found["requests"]
    console.print(
        f"Beside {starved['loops']} busy loops for {starved['seconds']:g} s: {starved['restarts']:g} restarts. "
        f"Requests: {counts.get('answered', 0)} answered, {counts.get('refused', 0)} refused, "
        f"{counts.get('lost', 0)} lost."
    )
    for reason, count in found["lost_reasons"].items():
        console.print(f"lost: {count} × {reason}")


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.recovery", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--kills", type=int, default=20, help="of a rank, and of a preparer [20]")
    parser.add_argument("--starve-s", type=float, default=15, help="seconds beside busy loops [15]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    command = ["encode_server.cli", "serve", "demo", "--device=cpu", "--cache-gb=0", "--log-level=error"]
    with server(command) as process:
        found = uvloop.run(run(process, args, console))
    show(console, found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if not found["requests"].get("lost") and not found["starved"]["restarts"] else 1


if __name__ == "__main__":
    sys.exit(main())
