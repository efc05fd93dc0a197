"""How soon a small server serves, and what it holds: `python -m benchmarks.memory [--against DIR] [--rounds 3]`.

The demo is started as a user would. Printed are the seconds from the command to the first good answers of `/livez`,
`/readyz` and `/health`, and a second later the memory of its processes. `--against`: the same of another checkout, with
the Python of that checkout's `.venv`, by turns with this one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import procfs
from benchmarks.processes import server

PATHS = ("/livez", "/readyz", "/health")
SETTLE_S = 1.0  # after the first good /health, before memory is looked at
HERE = "this checkout"


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout to compare with")
    parser.add_argument("--rounds", type=int, default=3, help="servers started of each [3]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    args = parser.parse_args(argv)
    checkouts: dict[str, Path | None] = {HERE: None}
    if args.against:
        if not (args.against / ".venv" / "bin" / "python").exists():
            print(f"benchmarks.memory: {args.against} has no .venv/bin/python", file=sys.stderr)
            return 2
        checkouts["the other checkout"] = args.against.resolve()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in checkouts}
    for turn in range(args.rounds):
        for name, checkout in list(checkouts.items())[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(measure(checkout))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(starts_table(found))
    console.print(memory_table(found))
    if args.json:
        args.json.write_text(json.dumps({"cores": os.cpu_count(), "servers": found}, indent=1) + "\n")
    return 0


def measure(checkout: Path | None = None) -> dict[str, Any]:
    """One server, from its start to its end: seconds by path and to stop, bytes by process."""
    with server(["encode_server.cli", "serve", "demo"], ready_path=PATHS[0], checkout=checkout) as demo:
        seconds = {PATHS[0]: demo.start_s} | {path: demo.wait(path) for path in PATHS[1:]}
        time.sleep(SETTLE_S)
        front = procfs.Process(demo.process.pid, "front")
        processes = {}
        for process in (front, *procfs.descendants(front.pid)):
            held = procfs.memory(process.pid)
            # A name may come twice where processes have none of their own.
            name = process.name if process.name not in processes else f"{process.name} ({process.pid})"
            processes[name] = {"rss": held.rss, "pss": held.pss, "private": held.private}
    return {"seconds": seconds, "stop_s": demo.stop_s, "processes": processes}


def total_pss(measured: dict[str, Any]) -> int:
    """Bytes that all processes of a server hold, shared pages counted once."""
    return sum(held["pss"] for held in measured["processes"].values())


def starts_table(found: dict[str, list[dict[str, Any]]]) -> Table:
    """Times, medians of all rounds."""
    table = Table(title="Demo: seconds from the command, and from SIGTERM to the end (median)", min_width=100)
    table.add_column("")
    for column in (*PATHS, "end"):
        table.add_column(column, justify="right")
    for name, rounds in found.items():
        times = [[one["seconds"][path] for one in rounds] for path in PATHS] + [[one["stop_s"] for one in rounds]]
        table.add_row(name, *(_spread(values) for values in times))
    return table


def memory_table(found: dict[str, list[dict[str, Any]]]) -> Table:
    """Memory by process of the last round, and the sum over all processes as a median of all rounds."""
    table = Table(
        title="Demo: MB by process a second after the first good /health",
        caption="PSS: a page that several processes map counts for each in equal parts; the sum is what is used",
        min_width=100,
    )
    for column in ("", "process", "RSS", "PSS", "its own"):
        table.add_column(column, justify="left" if column in ("", "process") else "right")
    for name, rounds in found.items():
        for process, held in rounds[-1]["processes"].items():
            table.add_row(name, process, *(f"{held[part] / 1e6:.0f}" for part in ("rss", "pss", "private")))
        whole = _spread([total_pss(one) / 1e6 for one in rounds], 0)
        table.add_row(name, "all", "", f"[bold]{whole}[/bold]", "", end_section=True)
    return table


def _spread(values: list[float], digits: int = 2) -> str:
    """Median (least…most)."""
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}…{max(values):.{digits}f})"


if __name__ == "__main__":
    sys.exit(main())
