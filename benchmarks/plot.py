"""Throughput and latency against concurrency, as a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.tables import by_concurrency, title


def draw(document: dict[str, Any], file: Path) -> None:
    """One row for each medium; the file's suffix says the format."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    loads = document["loads"]
    figure, axes = pyplot.subplots(len(loads), 2, figsize=(11, 3.6 * len(loads)), squeeze=False)
    for (what, measured), (rates, latencies) in zip(loads.items(), axes, strict=True):
        series = {"ours": measured["ours"]} | {f"naive: {k}": v for k, v in measured.get("naive", {}).items()}
        for name, slots in series.items():
            rounds = by_concurrency(slots)
            x = sorted(rounds)
            rates.plot(x, [_mean(rounds[n], "items_per_s") for n in x], marker="o", label=name)
            for percent, style in (("p50", "-"), ("p99", "--")):
                y = [statistics.fmean(slot["latency_s"][percent] * 1e3 for slot in rounds[n]) for n in x]
                latencies.plot(x, y, style, marker="o", label=f"{name}, {percent}")
        for kind, style in (("transformers", ":"), ("ours", "-.")):
            floors = [floors[kind] for floors in measured["floors"] if kind in floors]
            if floors:
                rates.axhline(statistics.fmean(floors), linestyle=style, color="grey", label=f"floor: {kind}")
        rates.set(title=f"{title(what)}: throughput", ylabel="items/s", ylim=(0, None))
        latencies.set(title=f"{title(what)}: latency", ylabel="ms", ylim=(0, None))
        for plot in (rates, latencies):
            plot.set_xscale("log", base=2)
            plot.set_xlabel("requests in progress")
            plot.grid(alpha=0.3)
            plot.legend(fontsize="small")
    facts = document["machine"]
    figure.suptitle(f"{facts['model']}, {facts['dtype']}, {facts['gpu'] or facts['cpu']}, {facts['cores']} cores")
    figure.tight_layout()
    figure.savefig(file)
    pyplot.close(figure)


def _mean(slots: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(slot[key] for slot in slots)
