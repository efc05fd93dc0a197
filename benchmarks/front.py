"""What a front with its preparers could feed: a whole server whose ranks answer immediately.

`python -m benchmarks.front [--media 224,448,…] [--processes 1,2] [--json FILE]`. Media come in as base64 in JSON, each
different and not cached; embeddings of a large tower's width leave as safetensors. Prints images per second here, CPU
milliseconds per image by process, and what these mean for machines with more cores, beside what a GPU could take.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import tables
from benchmarks.instant_rank import DTYPE_VARIABLE, WIDTH_VARIABLE
from benchmarks.processes import ServerProcess, server
from benchmarks.service import measure
from encode_server.bench.arguments import integers
from encode_server.bench.load import Load
from encode_server.bench.source import requests
from encode_server.errors import StartupError
from encode_server.models.demo import write_demo

MEDIA = ("224", "448", "896", "1344", "video", "audio")
MOST_PIXELS = 2048 * 2048  # so that no image that is measured is made smaller
CORES = (8, 16)
RANK_CORES = 1  # of a machine with a GPU: the rank's own thread, which keeps the GPU supplied
CEILINGS = {  # images per second at most on an H100: half of it is a good server
    "Qwen2.5-VL-7B": {"224": 2400, "448": 590, "896": 141, "1344": 58},
    "Qwen3-VL-8B": {"224": 4400, "448": 1010, "896": 196, "1344": 63},
}


@dataclass(frozen=True)
class Plan:
    """What to measure. `width`, `dtype`: of the embeddings. `seconds`: of each load."""

    media: tuple[str, ...]
    processes: tuple[int, ...]
    concurrency: tuple[int, ...]
    seconds: float
    width: int
    dtype: str


def main(argv: list[str] | None = None) -> int:
    """Measure and print; 1 when a request failed."""
    parser = argparse.ArgumentParser(prog="benchmarks.front", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--media", default=",".join(MEDIA), help=f"sides of square JPEGs, video, audio [{MEDIA}]")
    parser.add_argument("--processes", default="1,2", help="preparer processes [1,2]")
    parser.add_argument("--concurrency", default="1,8,32", help="requests in progress [1,8,32]")
    parser.add_argument("--seconds", type=float, default=1.2, help="of each load [1.2]")
    parser.add_argument("--width", type=int, default=3584, help="of an embedding's rows [3584, Qwen2.5-VL-7B's]")
    parser.add_argument("--dtype", default="bfloat16", help="of the embeddings [bfloat16]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there")
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        plan = Plan(
            tuple(args.media.split(",")),
            tuple(integers(args.processes)),
            tuple(integers(args.concurrency)),
            args.seconds,
            args.width,
            args.dtype,
        )
        slots = run(plan, console)
    except StartupError as error:
        print(f"benchmarks.front: {error}", file=sys.stderr)
        return 2
    console.print(measured_table(slots))
    console.print(extrapolated_table(slots))
    if args.json:
        args.json.write_text(json.dumps({"cores": os.cpu_count(), "slots": slots}, indent=1) + "\n")
    return 0 if all(slot["outcomes"].keys() == {"200"} for slot in slots) else 1


def run(plan: Plan, console: Console) -> list[dict[str, Any]]:
    """One slot for each medium, number of preparers, and concurrency."""
    slots = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(Path(folder) / "checkpoint")
        for processes in plan.processes:
            with instant_server(checkpoint, processes, plan.width, plan.dtype) as process:
                for what in plan.media:
                    for concurrency in plan.concurrency:
                        with console.status(f"{what}, {processes} preparer(s), {concurrency} at a time"):
                            load = Load(concurrency, seconds=plan.seconds, warmup_s=plan.seconds / 4)
                            slot = measure(process, requests([what]), load)
                        slots.append({"media": what, "processes": processes, "concurrency": concurrency} | slot)
    return slots


def write_checkpoint(directory: Path) -> Path:
    """The demo's processors, without their bound on the pixels of an image."""
    write_demo(directory)
    file = directory / "processor_config.json"
    document = json.loads(file.read_text())
    document["image_processor"]["size"]["longest_edge"] = MOST_PIXELS
    file.write_text(json.dumps(document))
    return directory


def instant_server(
    checkpoint: Path, processes: int, width: int, dtype: str
) -> contextlib.AbstractContextManager[ServerProcess]:
    """A server whose ranks answer immediately, ended after the block."""
    command = ["benchmarks.instant_server", "serve", str(checkpoint), "--device=cpu", "--cache-gb=0"]
    command += [f"--preproc-processes={processes}", "--log-level=warning"]
    return server(command, environment={WIDTH_VARIABLE: str(width), DTYPE_VARIABLE: dtype})


def extrapolated(slots: list[dict[str, Any]], what: str, cores: int) -> float:
    """Items per second that a front with its preparers could feed on a machine with so many cores.

    From the CPU times per item under load: the loop has a core of its own, and so has the rank; the front's other
    threads and the preparers share the remaining cores.
    """
    loaded = [slot for slot in slots if slot["media"] == what and slot["concurrency"] > 1] or slots
    loop_s, beside_s = (
        statistics.median(sum(slot["cpu_s_per_item"][part] for part in parts) for slot in loaded)
        for parts in (("loop",), ("threads", "preparers"))
    )
    return min(1 / loop_s, (cores - 1 - RANK_CORES) / beside_s)


def measured_table(slots: list[dict[str, Any]]) -> Table:
    """What each load came to on this machine."""
    table = Table(title="Ranks answer immediately: items per second, and CPU ms per item by process", min_width=100)
    columns = ("preparers", "at a time", "items/s", "p50 ms", *tables.PROCESSES.values(), "load client")
    for column in ("media", *columns):
        table.add_column(column, justify="right" if column != "media" else "left")
    for index, slot in enumerate(slots):
        if index and slot["media"] != slots[index - 1]["media"]:
            table.add_section()
        table.add_row(
            tables.title(slot["media"]),
            str(slot["processes"]),
            str(slot["concurrency"]),
            f"{slot['items_per_s']:.0f}",
            f"{slot['latency_s']['p50'] * 1e3:.1f}",
            *(f"{slot['cpu_s_per_item'][part] * 1e3:.2f}" for part in tables.PROCESSES),
            f"{slot['client_cpu_s_per_request'] * 1e3:.2f}",
        )
    return table


def extrapolated_table(slots: list[dict[str, Any]]) -> Table:
    """What that means for machines with more cores, beside what a GPU could take."""
    table = Table(
        title="Items per second that one front could feed, from the CPU times under load",
        caption=f"one core for the loop, {RANK_CORES} for the rank, the others for preparers and the front's threads",
        min_width=100,
    )
    for column in ("media", *(f"{cores} cores" for cores in CORES), *(f"H100: {name}" for name in CEILINGS)):
        table.add_column(column, justify="right" if column != "media" else "left")
    for what in dict.fromkeys(slot["media"] for slot in slots):
        ceilings = (str(ceiling.get(what, "")) for ceiling in CEILINGS.values())
        table.add_row(tables.title(what), *(f"{extrapolated(slots, what, cores):.0f}" for cores in CORES), *ceilings)
    return table


if __name__ == "__main__":
    sys.exit(main())
