"""What is printed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from rich.console import Group
from rich.table import Table

PROCESSES = {"loop": "front's loop", "threads": "front's threads", "preparers": "preparers", "ranks": "ranks"}
STAGES = ("front", "decode", "preprocess", "copy", "messages", "forward", "fetch", "deliver")


def machine(facts: dict[str, Any]) -> str:
    """One line."""
    where = facts["gpu"] or facts["cpu"]
    return (
        f"{facts['model']} on {where}, {facts['cores']} cores, {facts['dtype']}, {facts['threads']} threads, torch "
        f"{facts['torch']}, transformers {facts['transformers']}; load average before: {facts['load_before']:.1f}"
    )


def comparison(what: str, measured: dict[str, Any]) -> Table:
    """Floors, naive and ours, side by side."""
    table = Table(title=f"{title(what)}: unique media in, embeddings out", min_width=100)
    for column in (
        "",
        "at a time",
        "items/s",
        "tokens/s",
        "p50 ms",
        "p99 ms",
        "of floor",
        "of our floor",
        "lag p99 ms",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for kind, name in (("transformers", "floor: transformers, sdpa"), ("ours", "our floor")):
        rates = [floors[kind] for floors in measured["floors"] if kind in floors]
        best = measured["best"].get(kind, {})
        if not rates:
            table.add_row(name, "", best.get("error", "not measured"))
            continue
        batch = f"batch {best['batch']}" if best else ""
        tokens = best["tokens_per_s"] / best["items_per_s"] * statistics.fmean(rates) if best else 0
        over = [floors[kind] / floors["transformers"] for floors in measured["floors"] if "transformers" in floors]
        table.add_row(
            name,
            batch,
            spread(rates),
            f"{tokens:.0f}" if tokens else "",
            "",
            "",
            spread(over, 2) if kind == "ours" else "",
        )
    table.add_section()
    for name, slots in measured.get("naive", {}).items():
        for slot in slots:
            table.add_row(f"naive: {name}", *_slot([slot]))
    table.add_section()
    for slots in by_concurrency(measured["ours"]).values():
        lag = max(slot["metrics"]["loop_lag_p99_s"] for slot in slots) * 1e3
        ratios = [
            spread([slot[f"over_{kind}"] for slot in slots if f"over_{kind}" in slot], 3)
            for kind in ("transformers", "ours")
        ]
        table.add_row("ours", *_slot(slots), *ratios, f"{lag:.1f}")
    return table


def costs(what: str, measured: dict[str, Any]) -> Group:
    """Where the CPU time goes, and the latency of one item alone."""
    cpu = Table(title=f"{title(what)}: CPU ms per item in the service, by process", min_width=100)
    for column in ("at a time", *PROCESSES.values(), "load client", "items per batch"):
        cpu.add_column(column, justify="right")
    for concurrency, slots in by_concurrency(measured["ours"]).items():
        means = [statistics.fmean(slot["cpu_s_per_item"][part] for slot in slots) for part in PROCESSES]
        client = statistics.fmean(slot["client_cpu_s_per_request"] for slot in slots)
        batch = statistics.fmean(slot["metrics"]["items_per_batch"] for slot in slots)
        cpu.add_row(str(concurrency), *(f"{mean * 1e3:.2f}" for mean in (*means, client)), f"{batch:.1f}")

    stages = Table(
        title=f"{title(what)}: ms per item by stage",
        caption="the service's CPU: forward is all of the ranks', messages what the preparers use beside their stages",
        min_width=100,
    )
    names = sorted({stage for slot in measured["ours"] for stage in slot["metrics"]["stage_wall_s"]})
    columns = [*STAGES, *(name for name in names if name not in STAGES)]
    for column in ("", *columns):
        stages.add_column(column, justify="left" if not column else "right")
    alone = [slot for slot in measured["ours"] if "bare" in slot]
    for kind, suffix in (("bare, CPU", "_cpu_s"), ("bare, wall", "_s")) if alone else ():
        stages.add_row(kind, *(_ms(_mean(slot["bare"].get(stage + suffix) for slot in alone)) for stage in columns))
    for concurrency, slots in by_concurrency(measured["ours"]).items():
        cpu_means = [_mean(slot["stage_cpu_s"].get(stage) for slot in slots) for stage in columns]
        stages.add_row(f"service at {concurrency}, CPU", *map(_ms, cpu_means))
        stage_means = [_mean(slot["metrics"]["stage_wall_s"].get(stage) for slot in slots) for stage in columns]
        stages.add_row(f"service at {concurrency}, wall", *map(_ms, stage_means))

    latency = ""
    if alone:
        took, bare = ([seconds * 1e3 for seconds in seen] for seen in zip(*map(_alone, alone), strict=True))
        added = [one - other for one, other in zip(took, bare, strict=True)]
        latency = (
            f"One at a time: p50 {spread(took)} ms; decode, preprocess and forward bare, just before and after: "
            f"{spread(bare)} ms; the service adds {spread(added)} ms."
        )
    return Group(cpu, stages, latency)


def rest(document: dict[str, Any]) -> str:
    """Start-up, import, memory."""
    lines = []
    if startup := document.get("startup"):
        lines.append(
            f"demo: command to healthy {startup['demo_s']:.1f} s; import encode_server.client "
            f"{startup['import_client_s']:.2f} s"
        )
    if memory := document.get("memory"):
        lines.append(
            f"front's memory over {memory['requests']} requests: {memory['before'] / 1e6:.0f} MB before, "
            f"{memory['half'] / 1e6:.0f} half way, {memory['after'] / 1e6:.0f} after; "
            f"{memory['per_1000_requests'] / 1e6:+.2f} MB per 1,000 requests in the second half"
        )
    return "\n".join(lines)


def by_concurrency(slots: list[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The rounds of each."""
    found: dict[int, list[dict[str, Any]]] = {}
    for slot in slots:
        found.setdefault(slot["concurrency"], []).append(slot)
    return found


def title(what: str) -> str:
    """`224` → `224²`."""
    return f"{what}²" if what.isdigit() else what


def spread(values: list[float], digits: int = 1) -> str:
    """The mean, and how far the values lie apart."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}…{max(values):.{digits}f})"


def _slot(slots: list[dict[str, Any]]) -> list[str]:
    return [
        str(slots[0]["concurrency"]),
        spread([slot["items_per_s"] for slot in slots]),
        f"{statistics.fmean(slot['tokens_per_s'] for slot in slots):.0f}",
        *(spread([slot["latency_s"][name] * 1e3 for slot in slots]) for name in ("p50", "p99")),
    ]


def _alone(slot: dict[str, Any]) -> tuple[float, float]:
    """Median seconds in the service, one at a time, and bare."""
    return slot["latency_s"]["p50"], slot["bare"]["total_s"]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.2f}"
