"""`encode-server plan`: how many servers a load takes, from what a bench measured on one."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from encode_server.bench.goodput import Objective, Step, best, highest_rate
from encode_server.bench.mix import Mix, mix_from, read_mix
from encode_server.bench.plot import Line, Panel, write_plot
from encode_server.bench.report import percentile
from encode_server.bench.simulation import Kind, Machine, kinds_of, machine_of, simulate
from encode_server.errors import StartupError

MOST = 10_000.0  # items a second, up to which the plot goes
POINTS = 10
MOST_REQUESTS = 6000  # of one simulated rate


def run(options: dict[str, Any]) -> int:
    """Run the command; 1 when no server can hold the objective, else 0. Raises StartupError."""
    console = Console()
    bench = _read(options["bench"])
    mix = read_mix(options["mix"]) if options["mix"] else mix_from(bench["mix"], str(options["bench"]))
    given = bench["objective"]
    seconds = options["objective_ms"] / 1e3 if options["objective_ms"] else given["seconds"]
    objective = Objective(seconds, options["percentile"] or given["percent"])
    hit_rate = mix.repeat if options["hit_rate"] is None else options["hit_rate"]
    if options["rate"] <= 0 or not 0 <= hit_rate < 1 or not 0 <= options["headroom"] < 1:
        raise StartupError("--rate takes a number above 0, --hit-rate and --headroom a part from 0 to below 1")
    machine = machine_of(bench, cores=options["cores"], threads=options["threads"], hit_rate=hit_rate)
    kinds = kinds_of(bench, machine, [(share.media, share.items, share.weight) for share in mix.shares])
    planner = Planner(kinds, machine, objective, options["seconds"])
    goodput = planner.goodput()
    if goodput is None:
        console.print(f"one request alone does not hold {objective}", style="red")
        return 1
    plan = planner.plan(options["rate"], goodput, options["headroom"], mix, bench)
    console.print(_table(plan, objective))
    if options["json"]:
        options["json"].write_text(json.dumps(plan, indent=1) + "\n")
    if options["plot"]:
        panels = planner.panels(goodput, options["headroom"], mix, options["price"])
        note = f"One server: {goodput.rate:.4g} requests/s ({objective}). {options['headroom']:.0%} left free."
        write_plot(options["plot"], "Servers and latency by load", [note], panels)
    return 0


class Planner:
    """Simulations of one server. The servers of a plan share the load at random, so that one server stands for all."""

    def __init__(self, kinds: list[Kind], machine: Machine, objective: Objective, seconds: float) -> None:
        self._kinds, self._machine, self._objective, self._seconds = kinds, machine, objective, seconds

    def at(self, rate: float) -> Step:
        """One server at `rate` requests a second."""
        seconds = max(1.0, min(self._seconds, MOST_REQUESTS / rate))
        return simulate(self._kinds, self._machine, rate, seconds, self._objective)

    def goodput(self) -> Step | None:
        """The highest rate of one server that holds the objective; None when none does."""

        async def measure(rate: float) -> Step:
            return await asyncio.to_thread(self.at, rate)  # a loop of its own, in virtual time

        return best(asyncio.run(highest_rate(measure, self._objective, 8.0, 0.03)), self._objective)

    def plan(self, rate: float, goodput: Step, headroom: float, mix: Mix, bench: dict[str, Any]) -> dict[str, Any]:
        """Servers for `rate`, and what each of them needs."""
        servers = max(1, math.ceil(rate / (goodput.rate * (1 - headroom))))
        each = self.at(rate / servers)
        ordered = sorted(each.latencies)
        total = sum(kind.weight for kind in self._kinds)

        def mean(cost: str) -> float:
            per = sum(kind.weight * kind.items * float(getattr(kind, cost)) for kind in self._kinds) / total
            return per * (1 - self._machine.hit_rate)

        share = rate / servers
        held = sum(ordered) / max(1, len(ordered)) * share  # Little's law
        sizes = {entry["media"]: entry for entry in bench["profile"]}
        weights = sum(one.weight for one in mix.shares)
        held_bytes = sum(
            one.weight * one.items * (sizes[one.media]["bytes"] + sizes[one.media]["answer_bytes"])
            for one in mix.shares
        )
        return {
            "rate": rate,
            "items_per_s": rate * mix.items_per_request,
            "servers": servers,
            "ranks": servers * bench["server"]["capacity"]["tp"] * self._machine.groups,
            "requests_per_s_of_a_server": goodput.rate,
            "preparing_cores_of_a_server": share * mean("prepare_s"),
            "threads_of_a_server": max(1, math.ceil(share * mean("prepare_s") / 0.7)),
            "busy_of_a_rank": share * mean("forward_s") / (self._machine.computing * self._machine.groups),
            "requests_in_progress_of_a_server": held,
            "media_in_progress_mb_of_a_server": held * held_bytes / weights / 1e6,
            "latency_s": {f"p{percent}": percentile(ordered, percent) for percent in (50, 99)},
            "in_time": each.in_time / max(1, each.due),
        }

    def panels(self, goodput: Step, headroom: float, mix: Mix, price: float) -> list[Panel]:
        """Servers and latency by load, up to `MOST` items a second; and the latency of one server."""
        low, high = math.log10(10), math.log10(MOST)
        loads = [10 ** (low + (high - low) * step / (POINTS - 1)) for step in range(POINTS)]
        cost, half, most = [], [], []
        for load in loads:
            rate = load / mix.items_per_request
            servers = max(1, math.ceil(rate / (goodput.rate * (1 - headroom))))
            ordered = sorted(self.at(rate / servers).latencies)
            cost.append((load, servers * price))
            half.append((load, percentile(ordered, 50) * 1e3))
            most.append((load, percentile(ordered, 99) * 1e3))
        one = []
        for part in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1):
            ordered = sorted(self.at(goodput.rate * part).latencies)
            one.append((goodput.rate * part, percentile(ordered, 50) * 1e3, percentile(ordered, 99) * 1e3))
        limit = (self._objective.seconds * 1e3, str(self._objective))
        name = "servers" if price == 1 else "price of an hour"
        return [
            Panel("Cost", "items per second", name, [Line(name, cost)], log=True),
            Panel("Latency", "items per second", "milliseconds", [Line("p50", half), Line("p99", most)], limit, True),
            Panel(
                "One server",
                "requests per second",
                "milliseconds",
                [Line("p50", [(x, y) for x, y, _ in one]), Line("p99", [(x, y) for x, _, y in one])],
                limit,
            ),
        ]


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise StartupError(f"{path} is no JSON") from None
    if not isinstance(found, dict) or not {"mix", "objective", "profile", "server"} <= found.keys():
        raise StartupError(f"{path} is not of a bench that looked for a goodput: `encode-server bench --objective-ms`")
    return found


def _table(plan: dict[str, Any], objective: Objective) -> Table:
    table = Table(
        title=f"{plan['rate']:g} requests/s, {plan['items_per_s']:.4g} items/s: {objective}", show_header=False
    )
    latency = plan["latency_s"]
    for name, value in (
        ("servers", f"{plan['servers']}"),
        ("ranks", f"{plan['ranks']}"),
        ("one server holds", f"{plan['requests_per_s_of_a_server']:.4g} requests/s"),
        ("of each: cores that prepare", f"{plan['preparing_cores_of_a_server']:.2f}"),
        ("of each: preparers' threads", f"{plan['threads_of_a_server']} or more"),
        ("of each: ranks busy", f"{plan['busy_of_a_rank']:.0%}"),
        ("of each: requests in progress", f"{plan['requests_in_progress_of_a_server']:.1f}"),
        ("of each: media, embeddings held", f"{plan['media_in_progress_mb_of_a_server']:.1f} MB"),
        ("latency", f"p50 {latency['p50'] * 1e3:.0f} ms, p99 {latency['p99'] * 1e3:.0f} ms"),
        ("in time", f"{plan['in_time']:.1%}"),
    ):
        table.add_row(name, value)
    return table
