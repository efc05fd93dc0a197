"""`encode-server bench URL`: load a running server and say how fast it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from encode_server.bench.arguments import integers
from encode_server.bench.client import LoadClient
from encode_server.bench.load import Load, run_load
from encode_server.bench.report import LoadReport
from encode_server.bench.source import requests


def run(options: dict[str, Any]) -> int:
    """Run the command; 1 when a request failed, else 0."""
    console = Console(stderr=options["json"] == "-")
    whats = options["media"].split(",")
    stages: list[tuple[str, Load]] = []
    common = {"seconds": options["seconds"], "warmup_s": options["warmup_s"]}
    if options["rate"] is not None:
        stages.append((f"{options['rate']:g}/s", Load(rate=options["rate"], **common)))
    else:
        stages += [(f"at {n}", Load(concurrency=n, **common)) for n in integers(options["concurrency"])]

    async def measure() -> dict[str, LoadReport]:
        reports = {}
        source = requests(whats, options["items"])
        client = LoadClient(options["url"], api_key=options["api_key"])
        with progress(console) as show:
            for name, load in stages:
                reports[name] = await run_load(client, source, load, on_progress=show(name))
        client.close()
        return reports

    reports = uvloop.run(measure())
    console.print(_table(options["url"], options["media"], reports))
    for name, report in reports.items():
        for error, count in report.errors.most_common(3):
            console.print(f"{name}: {count} × {error}", style="red", markup=False)
    _write(options["json"], {name: report.document() for name, report in reports.items()})
    return 1 if any(report.failed for report in reports.values()) else 0


ShowProgress = Callable[[float, LoadReport], None]


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], ShowProgress]]:
    """Bars on the console: call what is yielded with a bar's name, and its result with the share done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}"))
    # Seldom: drawing costs processor time that the server under load could use.
    with Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=2, transient=True) as bars:

        def show(name: str) -> ShowProgress:
            bar = bars.add_task(name, total=1.0, rate="")

            def update(done: float, report: LoadReport) -> None:
                failed = f", {report.failed} failed" if report.failed else ""
                bars.update(bar, completed=done, rate=f"{report.items} items{failed}")

            return update

        yield show


def _table(url: str, media: str, reports: dict[str, LoadReport]) -> Table:
    table = Table(title=f"{media} to {url}")
    for column in ("load", "items/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms", "answers", "client CPU ms"):
        table.add_column(column, justify="right")
    for name, report in reports.items():
        table.add_row(
            name,
            f"{report.items_per_s:.1f}",
            f"{report.tokens_per_s:.0f}",
            *(f"{report.latency_s(percent) * 1e3:.1f}" for percent in (50, 90, 99)),
            ", ".join(f"{count} × {status or 'none'}" for status, count in sorted(report.outcomes.items())),
            f"{report.cpu_s / max(1, report.requests) * 1e3:.2f}",
        )
    return table


def _write(where: str | None, document: dict[str, Any]) -> None:
    if where == "-":
        json.dump(document, sys.stdout, indent=1)
        print()
    elif where is not None:
        Path(where).write_text(json.dumps(document, indent=1) + "\n")
