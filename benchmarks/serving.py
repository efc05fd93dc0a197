"""The service beside its floors and a naive server, in one run: `uv run python -m benchmarks.serving --model DIR`."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import tables
from benchmarks.processes import FloorProcess, floor, server
from benchmarks.service import Progress, measure, measure_ours
from benchmarks.small import import_seconds, memory, start_seconds
from encode_server.bench.arguments import integers
from encode_server.bench.command import progress
from encode_server.bench.load import Load
from encode_server.bench.source import LoadRequest, requests
from encode_server.errors import StartupError

BATCHES = (1, 2, 4, 8, 16)
REQUESTS_PER_SLOT = 4  # measured at least, so that a loop of 32 is seen through several batches


@dataclass(frozen=True)
class Plan:
    """What to measure, and how."""

    model: Path
    device: str
    dtype: str
    threads: int
    concurrency: tuple[int, ...]
    seconds: float
    rounds: int
    serve: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The service's command line."""
        options = [f"--device={self.device}", f"--dtype={self.dtype}", f"--rank-threads={self.threads}"]
        return ["encode_server.cli", "serve", str(self.model), *options, "--log-level=warning", *self.serve]

    def floor(self, kind: str) -> Any:
        """A floor's process, as a context manager."""
        return floor(kind, self.model, self.device, self.dtype, self.threads)

    def load(self, concurrency: int, items_per_s: float) -> Load:
        """Long enough for the rate to be expected: a warm-up that fills the queue, then several times the queue."""
        round_s = concurrency / max(items_per_s, 1e-3)
        return Load(concurrency, seconds=max(self.seconds, REQUESTS_PER_SLOT * round_s), warmup_s=1.0 + 1.5 * round_s)


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when a request of the service failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint directory [the demo's]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda [auto]")
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 on CUDA, float32 else [auto]")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of floors and rank [all cores]")
    parser.add_argument("--sizes", default="224,448", help="sides of square JPEGs in pixels [224,448]")
    parser.add_argument(
        "--also", default="", help="of video,audio,mix: measure these too; mix is all of them, at random"
    )
    parser.add_argument("--concurrency", default="1,8,32", help="[1,8,32]")
    parser.add_argument("--seconds", type=float, default=10, help="least measured time of a load [10]")
    parser.add_argument("--rounds", type=int, default=2, help="times all loads are run, floors between them [2]")
    parser.add_argument("--naive", action=argparse.BooleanOptionalAction, default=True, help="the naive servers too")
    parser.add_argument("--startup", action=argparse.BooleanOptionalAction, default=True, help="times of starting too")
    parser.add_argument("--rss-requests", type=int, default=0, help="watch the front's memory over so many requests")
    parser.add_argument("--serve-options", default="", help="more options for the service, e.g. '--preproc-workers 2'")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw throughput and latency there (png, svg, pdf)")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except StartupError as error:
        print(f"benchmarks.serving: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    whats, mix = _whats(args)
    plan = _plan(args)
    console = Console(width=None if sys.stdout.isatty() else 150)
    document: dict[str, Any] = {"machine": machine(plan), "loads": {}}
    console.print(tables.machine(document["machine"]))
    with progress(console) as show:
        if args.startup:
            document["startup"] = {"demo_s": start_seconds(), "import_client_s": import_seconds()}
        for what in whats:
            document["loads"][what] = measured = compare(plan, what, show)
            if args.naive and what.isdigit():
                measured["naive"] = naive(plan, what, measured, show)
            console.print(tables.comparison(what, measured))
            console.print(tables.costs(what, measured))
        if mix:
            document["loads"]["mix"] = measured = mixed(plan, mix, document["loads"], show)
            console.print(tables.comparison("mix", measured))
        if args.rss_requests:
            with server(plan.command) as ours:
                document["memory"] = memory(ours, requests(whats[:1]), args.rss_requests, show("memory"))
    console.print(tables.rest(document))
    if args.json:
        args.json.write_text(json.dumps(document, indent=1) + "\n")
    if args.plot:
        from benchmarks.plot import draw

        draw(document, args.plot)
    failed = sum(
        slot["requests"] - slot["outcomes"].get("200", 0)
        for measured in document["loads"].values()
        for slot in measured["ours"]
    )
    return 1 if failed else 0


def compare(plan: Plan, what: str, show: Any) -> dict[str, Any]:
    """One medium: floors before, between and after the service's loads, so that drift of the machine shows."""
    with ExitStack() as stack:
        floors = {kind: stack.enter_context(plan.floor(kind)) for kind in ("transformers", "ours")}
        for process in floors.values():
            process.wait_ready()
        batches = [batch for batch in BATCHES if what.isdigit() or batch <= 4]
        best = {
            kind: process.do("best", what=what, batches=batches, seconds=plan.seconds / 5)
            for kind, process in floors.items()
        }
        measured: dict[str, Any] = {"best": best, "floors": [], "ours": []}
        if "error" in best["ours"]:
            raise StartupError(f"{what}: {best['ours']['error']}")
        ours = stack.enter_context(server(plan.command))
        source = requests([what])
        measured["floors"].append(_floors(plan, floors, best, what))
        for turn in range(plan.rounds):
            for concurrency in plan.concurrency:
                load = plan.load(concurrency, best["ours"]["items_per_s"])
                on_progress: Progress = show(f"{what}: service, {concurrency} at a time, round {turn + 1}")
                bares = [_bare(plan, floors, what)] if concurrency == 1 else []
                slot = measure_ours(ours, source, load, on_progress)
                if bares:
                    bares.append(_bare(plan, floors, what))
                if bares and not any("error" in bare for bare in bares):
                    slot["bare"] = {name: statistics.fmean(bare[name] for bare in bares) for name in bares[0]}
                measured["floors"].append(_floors(plan, floors, best, what))
                measured["ours"].append(slot | {"concurrency": concurrency} | _ratios(slot, measured["floors"][-2:]))
    return measured


def _bare(plan: Plan, floors: dict[str, FloorProcess], what: str) -> dict[str, float]:
    """One item at a time with nothing around it, now."""
    return floors["ours"].do("bare", what=what, seconds=plan.seconds / 4)


def _floors(
    plan: Plan, floors: dict[str, FloorProcess], best: dict[str, dict[str, Any]], what: str
) -> dict[str, float]:
    """Both floors' items per second now, at their best batch size."""
    rates = {}
    for kind, process in floors.items():
        if "error" not in best[kind]:
            rate = process.do("measure", what=what, batch=best[kind]["batch"], seconds=plan.seconds / 3)
            rates[kind] = float(rate["items_per_s"])
    return rates


def _ratios(slot: dict[str, Any], around: list[dict[str, float]]) -> dict[str, float]:
    """The service's rate over the mean of the floors just before and just after it."""
    return {
        f"over_{kind}": slot["items_per_s"] / statistics.fmean(rates[kind] for rates in around) for kind in around[0]
    }


def naive(plan: Plan, what: str, measured: dict[str, Any], show: Any) -> dict[str, list[dict[str, Any]]]:
    """The naive server, all in the handler and with a pool of threads."""
    options = [f"--model={plan.model}", f"--device={plan.device}", f"--dtype={plan.dtype}", f"--threads={plan.threads}"]
    expected = measured["best"].get("transformers", {}).get("items_per_s") or measured["best"]["ours"]["items_per_s"]
    found = {}
    for name, pool in (("handler", 0), ("pool", 8)):
        with server(["benchmarks.naive", *options, f"--pool={pool}"]) as process:
            found[name] = [
                measure(process, requests([what]), plan.load(n, expected), show(f"{what}: naive {name}, {n} at a time"))
                | {"concurrency": n}
                for n in plan.concurrency
            ]
    return found


def mixed(plan: Plan, whats: list[str], loads: dict[str, Any], show: Any) -> dict[str, Any]:
    """All media at random. Its floor: the time the floors took for one of each."""
    floors = {
        kind: len(whats) / sum(1 / statistics.fmean(f[kind] for f in loads[what]["floors"]) for what in whats)
        for kind in ("transformers", "ours")
        if all(kind in loads[what]["floors"][0] for what in whats)
    }
    measured: dict[str, Any] = {"best": {}, "floors": [floors], "ours": []}
    source: Iterator[LoadRequest] = requests(whats)
    with server(plan.command) as ours:
        for turn in range(plan.rounds):
            for concurrency in plan.concurrency:
                on_progress = show(f"mix: service, {concurrency} at a time, round {turn + 1}")
                slot = measure_ours(ours, source, plan.load(concurrency, floors["ours"]), on_progress)
                measured["ours"].append(slot | {"concurrency": concurrency} | _ratios(slot, [floors]))
    return measured


def machine(plan: Plan) -> dict[str, Any]:
    """What it was measured on and with."""
    import torch
    import transformers

    gpu = torch.cuda.get_device_name(0) if plan.device.startswith("cuda") else None
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model.partition(": ")[2] or platform.machine(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": plan.model.name,
        "device": plan.device,
        "dtype": plan.dtype,
        "threads": plan.threads,
    }


def _plan(args: argparse.Namespace) -> Plan:
    import torch

    from encode_server.models.demo import demo_path

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype if args.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
    return Plan(
        model=args.model or demo_path(),
        device=device,
        dtype=dtype,
        threads=args.threads,
        concurrency=tuple(integers(args.concurrency)),
        seconds=args.seconds,
        rounds=args.rounds,
        serve=tuple(shlex.split(args.serve_options)),
    )


def _whats(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The media to measure one by one, and those of the mix."""
    whats = [str(size) for size in integers(args.sizes)]
    also = [name for name in args.also.split(",") if name]
    if unknown := set(also) - {"video", "audio", "mix"}:
        raise StartupError(f"--also: got {', '.join(sorted(unknown))}, takes video, audio, mix")
    whats += [name for name in also if name != "mix"]
    return whats, whats if "mix" in also else []


if __name__ == "__main__":
    sys.exit(main())
