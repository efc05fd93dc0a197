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

from encode_server import __version__
from encode_server.bench.arguments import integers
from encode_server.bench.client import LoadClient
from encode_server.bench.goodput import Objective, Step, best, highest_rate, measure_rate
from encode_server.bench.load import Load, run_load
from encode_server.bench.mix import Mix, mix_of, read_mix
from encode_server.bench.plot import Line, Panel, write_plot
from encode_server.bench.profile import profile, server_status
from encode_server.bench.report import LoadReport, percentile
from encode_server.bench.source import LoadRequest, mixed
from encode_server.errors import StartupError

GIVEN_UP = 4.0  # times the objective after which a request counts as lost
FIRST_RATE = 2.0


def run(options: dict[str, Any]) -> int:
    """Run the command; 1 when a request failed or no rate held the objective, else 0."""
    console = Console(stderr=options["json"] == "-")
    mix = read_mix(options["mix"]) if options["mix"] else mix_of(options["media"], options["items"])
    if (plot := options["plot"]) is not None and plot.suffix not in (".html", ".png"):
        raise StartupError(f"--plot: got {plot.name!r}, takes a file that ends in .html or .png")
    source = mixed(mix, chat_model=options["model"] if options["api"] == "chat" else None)
    if options["objective_ms"] is not None:
        return _find(options, mix, source, console)
    stages: list[tuple[str, Load]] = []
    common = {"seconds": options["seconds"], "warmup_s": options["warmup_s"]}
    if options["rate"] is not None:
        stages.append((f"{options['rate']:g}/s", Load(rate=options["rate"], **common)))
    else:
        stages += [(f"at {n}", Load(concurrency=n, **common)) for n in integers(options["concurrency"])]

    async def measure() -> dict[str, LoadReport]:
        reports = {}
        client = LoadClient(options["url"], api_key=options["api_key"])
        with progress(console) as show:
            for name, load in stages:
                reports[name] = await run_load(client, source, load, on_progress=show(name))
        client.close()
        return reports

    reports = uvloop.run(measure())
    console.print(_table(options["url"], _said(mix), reports))
    for name, report in reports.items():
        for error, count in report.errors.most_common(3):
            console.print(f"{name}: {count} × {error}", style="red", markup=False)
    _write(options["json"], {name: report.document() for name, report in reports.items()})
    if plot is not None:
        _draw_reports(plot, options["url"], _said(mix), reports)
    return 1 if any(report.failed for report in reports.values()) else 0


def _find(options: dict[str, Any], mix: Mix, source: Iterator[LoadRequest], console: Console) -> int:
    """The highest rate that holds the objective. Raises StartupError for options by which no search ends."""
    if not options["precision"] > 0:
        raise StartupError(f"--precision: got {options['precision']:g}, takes a number above zero, 0.1 for a tenth")
    if options["rate"] is not None and not options["rate"] > 0:
        raise StartupError(f"--rate: got {options['rate']:g}, takes requests a second, above zero")
    objective = Objective(options["objective_ms"] / 1e3, options["percentile"])
    costs: list[dict[str, Any]] = []
    server: dict[str, Any] | None = None

    async def search() -> list[Step]:
        nonlocal costs, server
        patient = LoadClient(options["url"], api_key=options["api_key"], keep_body=True)
        if options["api"] == "encode" and await server_status(patient) is not None:
            costs = await profile(patient, mix)
        client = LoadClient(
            options["url"], api_key=options["api_key"], timeout_s=max(1.0, GIVEN_UP * objective.seconds)
        )
        with progress(console) as show:

            async def measure(rate: float) -> Step:
                step = await measure_rate(
                    client,
                    source,
                    rate,
                    objective,
                    seconds=options["seconds"],
                    warmup_s=options["warmup_s"],
                    on_progress=show(f"{rate:.3g}/s"),
                )
                mark = "[green]held[/]" if step.holds(objective) else "[red]missed[/]"
                console.print(f"{rate:10.4g}/s  {mark}  {step.in_time} of {step.due} in time")
                return step

            first = options["rate"] or FIRST_RATE
            steps = await highest_rate(measure, objective, first, options["precision"])
        server = await server_status(patient)  # by now it has learnt what a forward costs
        client.close()
        patient.close()
        return steps

    steps = uvloop.run(search())
    found = best(steps, objective)
    console.print(_steps_table(options["url"], f"{_said(mix)}: {objective}", steps, objective))
    if found is None:
        console.print(f"no rate held {objective}", style="red")
    else:
        per_s = f"{found.rate:.4g} requests/s, {found.items_per_s:.4g} items/s"
        console.print(f"goodput: {per_s} ({objective})", style="bold green", highlight=False)
    document = {
        "version": __version__,
        "url": options["url"],
        "api": options["api"],
        "mix": mix.document(),
        "objective": {"seconds": objective.seconds, "percent": objective.percent},
        "goodput": None if found is None else {"rate": found.rate, "items_per_s": found.items_per_s},
        "steps": [step.document(objective) for step in steps],
        "profile": costs,
        "server": server,
    }
    _write(options["json"], document)
    if options["plot"] is not None:
        _draw_steps(options["plot"], options["url"], _said(mix), steps, objective)
    return 1 if found is None else 0


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


def _said(mix: Mix) -> str:
    """The mix in words, for titles."""
    one = len(mix.shares) == 1
    said = [
        (f"{share.items} × " if share.items > 1 else "") + share.media + ("" if one else f" (weight {share.weight:g})")
        for share in mix.shares
    ]
    return ", ".join(said) + (f", {mix.repeat:.0%} seen before" if mix.repeat else "")


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


def _steps_table(url: str, what: str, steps: list[Step], objective: Objective) -> Table:
    table = Table(title=f"{what}, {url}")
    for column in ("requests/s", "items/s in time", "p50 ms", "p99 ms", "in time", "objective"):
        table.add_column(column, justify="right")
    for step in sorted(steps, key=lambda step: step.rate):
        ordered = sorted(step.latencies)
        table.add_row(
            f"{step.rate:.4g}",
            f"{step.items_per_s:.4g}",
            *(f"{percentile(ordered, percent) * 1e3:.1f}" for percent in (50, 99)),
            f"{step.in_time / step.due:.1%}" if step.due else "–",
            "held" if step.holds(objective) else "missed, given up" if step.given_up else "missed",
        )
    return table


def _draw_steps(path: Path, url: str, what: str, steps: list[Step], objective: Objective) -> None:
    ordered = [(step, sorted(step.latencies)) for step in sorted(steps, key=lambda step: step.rate) if step.latencies]
    lines = [
        Line(f"p{percent}", [(step.rate, percentile(found, percent) * 1e3) for step, found in ordered])
        for percent in (50, 99)
    ]
    panels = [
        Panel("Latency", "requests per second", "milliseconds", lines, (objective.seconds * 1e3, str(objective))),
        Panel(
            "Answered in time",
            "requests per second",
            "items per second",
            [Line("in time", [(step.rate, step.items_per_s) for step, _ in ordered])],
        ),
    ]
    found = best(steps, objective)
    goodput = "No rate held the objective." if found is None else f"Goodput: {found.rate:.4g} requests a second."
    write_plot(path, f"{what} to {url}", [goodput], panels)


def _draw_reports(path: Path, url: str, what: str, reports: dict[str, LoadReport]) -> None:
    found = [report for report in reports.values() if report.items]
    lines = [
        Line(f"p{percent}", [(report.items_per_s, report.latency_s(percent) * 1e3) for report in found])
        for percent in (50, 99)
    ]
    write_plot(path, f"{what} to {url}", [], [Panel("Latency", "items per second", "milliseconds", lines)])


def _write(where: str | None, document: dict[str, Any]) -> None:
    if where == "-":
        json.dump(document, sys.stdout, indent=1)
        print()
    elif where is not None:
        Path(where).write_text(json.dumps(document, indent=1) + "\n")
