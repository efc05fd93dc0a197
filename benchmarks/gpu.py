"""The whole GPU part in one run of less than 8 minutes: `uv run python -m benchmarks.gpu --json FILE`.

Correctness first; then the floors of towers of released sizes at several picture sizes, against the device's own
matrix product; then the service. Needs no network and no checkpoint, and writes to a temporary directory only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.card.sheets import CARDS
from benchmarks.correctness import PICTURES, checks, relative_error, run_ranks
from benchmarks.floors import Floor, OurFloor, TransformersFloor
from benchmarks.gpu_busy import BusySampler
from benchmarks.processes import ServerProcess, server
from benchmarks.roofline import FUSED
from benchmarks.service import measure_ours
from benchmarks.towers import FULL_SIZE, SMALL, TINY, Tower, write_checkpoint
from encode_server.bench.load import Load
from encode_server.bench.source import requests
from encode_server.media.limits import MediaLimits
from encode_server.media.unique import jpeg
from encode_server.models.encoder import DTYPES
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import open_directory
from encode_server.wire.modality import Modality

SLOW_S = 1.0  # a batch that takes longer is not tried larger
STOP_S = 60.0  # that what has begun may take beyond the time


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    `checked`, `pictures`: towers whose embeddings are compared, and of what. `patches`: most in one batch of a floor.
    `concurrency`, `seconds`: of a load.
    """

    towers: dict[str, Tower]
    checked: dict[str, Tower]
    pictures: tuple[tuple[int, int], ...]
    floors: tuple[int, ...]
    service: tuple[int, ...]
    concurrency: int
    seconds: float
    gemm: int
    batches: tuple[int, ...]
    patches: int = 65536


def real_sizes() -> Sizes:
    """What a GPU is measured with."""
    return Sizes(FULL_SIZE, SMALL, PICTURES, (224, 448, 896, 1344, 1792), (448, 896), 64, 8.0, 8192, (1, 4, 16))


def tiny_sizes() -> Sizes:
    """As little as goes through every line."""
    tower = dict([next(iter(TINY.items()))])
    return Sizes(tower, tower, ((56, 56), (112, 84)), (56, 112), (112,), 4, 0.5, 256, (1, 2))


@dataclass
class Run:
    """Where and what to measure, what was found so far, and when to begin nothing new."""

    device: str
    sizes: Sizes
    folder: Path
    ends: float
    console: Console
    file: Path | None
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """bf16 is what a GPU is asked for; a CPU that only tries the script out may not multiply it."""
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def left_s(self) -> float:
        """Seconds until nothing new is begun."""
        return max(0.0, self.ends - time.monotonic())

    def save(self) -> None:
        """Write what was found so far, for whoever is cut off later."""
        if self.file is not None:
            self.file.write_text(json.dumps(self.found, indent=1) + "\n")

    def late(self, what: str) -> bool:
        """Whether the time is up; says then what is left out."""
        if time.monotonic() < self.ends:
            return False
        self.console.print(f"out of time: {what} is left out")
        self.found.setdefault("left_out", []).append(what)
        return True


def main(argv: list[str] | None = None) -> int:
    """Run everything; 1 when an embedding is wrong or a request failed; 0 also where there is no GPU."""
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the script out")
    parser.add_argument("--tiny", action="store_true", help="small towers and pictures, to try the script out")
    parser.add_argument("--budget-s", type=float, default=420, help="begin nothing new after so many seconds [420]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything found there")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 0
    if args.device == "cpu":
        torch.set_num_threads(1)
    started = time.monotonic()
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory() as folder:
        sizes = tiny_sizes() if args.tiny else real_sizes()
        run = Run(args.device, sizes, Path(folder), started + args.budget_s, console, args.json)
        try:
            good = _run(run)
        finally:  # what was found before something failed is worth having
            run.found["seconds"] = time.monotonic() - started
            run.save()
    console.print(f"{run.found['seconds']:.0f} s in all")
    return 0 if good else 1


def _run(run: Run) -> bool:
    run.found["machine"] = machine(run.device)
    run.console.print(" · ".join(f"{name} {value}" for name, value in run.found["machine"].items()))
    right = correctness(run)
    run.save()
    if not right:
        run.console.print("the embeddings are wrong: nothing is timed")
        return False
    run.found["gemm_tflop_s"] = gemm = gemm_rate(run)
    run.console.print(f"a product of two {run.sizes.gemm}² matrices: {gemm:.1f} TFLOP/s")
    failed = 0
    run.found["towers"] = {}
    for name, tower in run.sizes.towers.items():
        if run.late(name):
            continue
        path = write_checkpoint(tower, run.folder / "full" / tower.model_type, dtype=run.dtype, device=run.device)
        run.found["towers"][name] = document = {"floors": floors(run, tower, path)}
        document["predicted"] = predictions(run, name, path)
        run.console.print(floors_table(name, document["floors"], gemm, document["predicted"]))
        run.save()
        document["service"] = service(run, path, document["floors"])
        run.save()
        run.console.print(service_table(name, document["service"]))
        failed += sum(slot["requests"] - slot["outcomes"].get("200", 0) for slot in document["service"].values())
        document["parallel"] = parallel(run, path)
    return failed == 0


def machine(device: str) -> dict[str, Any]:
    """What it is run on and with."""
    import transformers

    facts: dict[str, Any] = {"cores": os.cpu_count(), "python": platform.python_version()}
    facts |= {"torch": torch.__version__, "transformers": transformers.__version__}
    if device == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(0), "gpus": torch.cuda.device_count()}
    return facts


def correctness(run: Run) -> bool:
    """Small towers against fp32 on the CPU; prints each check as it ends."""
    run.found["correctness"] = []
    for check in checks(run.device, run.folder, run.sizes.checked, run.sizes.pictures):
        run.found["correctness"].append(check.document())
        mark = "ok   " if check.ok else "WRONG"
        run.console.print(f"{mark} {check.name}: off by {check.error:.1e}, at most {check.limit:.0e}. {check.note}")
    return all(check["ok"] for check in run.found["correctness"])


def gemm_rate(run: Run) -> float:
    """TFLOP/s of a square matrix product, the most that any forward can reach."""
    side = run.sizes.gemm
    a, b = (torch.randn(side, side, device=run.device, dtype=DTYPES[run.dtype]) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        if run.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - started) / 10)
    return 2 * side**3 / best / 1e12


def floors(run: Run, tower: Tower, path: Path) -> dict[str, dict[str, Any]]:
    """By picture size: our floor and transformers' at their best batch sizes, and TFLOP/s."""
    found: dict[str, dict[str, Any]] = {}
    kinds: dict[str, Floor] = {
        "ours": OurFloor(path, run.device, run.dtype, distinct=1),
        "transformers": TransformersFloor(path, run.device, run.dtype, distinct=1),
    }
    for side in run.sizes.floors:
        if run.late(f"floors at {side}²"):
            continue
        batches = tuple(n for n in run.sizes.batches if n == 1 or n * tower.patches(side) <= run.sizes.patches)
        found[str(side)] = {"tflop": tower.tflop(side)}
        for kind, floor in kinds.items():
            best = _best(run, floor, str(side), batches)
            found[str(side)][kind] = best | {"tflop_s": best["items_per_s"] * tower.tflop(side)}
    del kinds, floor
    gc.collect()
    if run.device == "cuda":
        torch.cuda.empty_cache()
    return found


def _best(run: Run, floor: Floor, what: str, batches: tuple[int, ...]) -> dict[str, Any]:
    """As `Floor.best`; a batch that doesn't fit ends the search, and so does one that takes long, or the time's end."""
    fitting: tuple[int, ...] = ()
    for batch in batches:
        try:
            tried = floor.measure(what, batch, 0.0)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        fitting += (batch,)
        if tried.seconds_per_batch > SLOW_S or run.left_s == 0:
            break
    if not fitting:
        return {"items_per_s": 0.0, "batch": 0, "error": "out of memory"}
    return floor.best(what, fitting, run.sizes.seconds / 16)


def predictions(run: Run, name: str, path: Path) -> dict[str, dict[str, Any]]:
    """By picture size: what `benchmarks.roofline` says of full batches on this card; empty without its data sheet.

    In a process that sees no GPU, because counting replaces parts of torch.cuda.
    """
    gpu = torch.cuda.get_device_name(0) if run.device == "cuda" else "H100"  # a CPU only tries the script out
    card = next((card for card in CARDS if card in gpu), None)
    if card is None or run.late("the prediction"):
        return {}
    file = run.folder / "predicted.json"
    sizes = ",".join(map(str, run.sizes.floors))
    options = [f"--model={path}", f"--card={card}", f"--sizes={sizes}", f"--way={FUSED}", f"--json={file}"]
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    try:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.roofline", *options],
            check=True,
            env=hidden,
            capture_output=True,
            timeout=run.left_s + STOP_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        run.found.setdefault("left_out", []).append(f"the prediction for {name}: {error}")
        return {}
    return {str(row["side"]): row for row in json.loads(file.read_text())}


def service(run: Run, path: Path, floors: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By picture size: the whole service over loopback HTTP, and how much of the time the device was busy."""
    found: dict[str, dict[str, Any]] = {}
    command = ["encode_server.cli", "serve", str(path), f"--device={run.device}", f"--dtype={run.dtype}"]
    cores = min(64, len(os.sched_getaffinity(0)))
    options = ["--rank-threads=1", f"--preproc-workers={cores}", "--log-level=warning"]
    sides = [side for side in run.sizes.service if str(side) in floors]
    if not sides or run.late("the service"):
        return found
    with server([*command, *options], timeout_s=run.left_s + STOP_S) as process:
        for side in sides:
            if run.late(f"the service at {side}²"):
                continue
            found[str(side)] = _serve(run, process, side, floors[str(side)]["ours"]["items_per_s"])
    return found


def _serve(run: Run, process: ServerProcess, side: int, floor: float) -> dict[str, Any]:
    load = Load(run.sizes.concurrency, seconds=run.sizes.seconds, warmup_s=run.sizes.seconds / 4)
    with BusySampler(run.device, after_s=load.warmup_s, for_s=load.seconds) as busy:
        slot = measure_ours(process, requests([str(side)]), load)
    return slot | {"over_our_floor": slot["items_per_s"] / floor if floor else 0.0, "gpu_busy": busy.share}


def parallel(run: Run, path: Path) -> dict[str, Any]:
    """With several GPUs: the same batch over 2, 4 and 8 of them, compared with one."""
    devices = torch.cuda.device_count() if run.device == "cuda" else 0
    worlds = [world for world in (2, 4, 8) if world <= devices]
    if not worlds or run.late("tensor parallelism over NCCL"):
        return {}
    preprocessor = Preprocessor(open_directory(path), MediaLimits())
    items = [dict(preprocessor.prepare(Modality.IMAGE, jpeg(896, 896, seed).copy()).tensors) for seed in range(4)]
    alone, facts = run_ranks(path, items, "cuda", run.dtype, "nccl", 1)
    found: dict[str, Any] = {"1": facts}
    for world in worlds:
        embeddings, facts = run_ranks(path, items, "cuda", run.dtype, "nccl", world)
        found[str(world)] = facts | {"error": relative_error(embeddings, alone)}
        run.console.print(f"{world} GPUs over NCCL: {found[str(world)]}")
    return found


def floors_table(
    name: str, found: dict[str, dict[str, Any]], gemm: float, predicted: dict[str, dict[str, Any]]
) -> Table:
    """Our floor, transformers', what the device could do at most, and what was predicted."""
    table = Table(title=f"{name}: forward on ready tensors, one process", min_width=100)
    columns = (
        "picture",
        "TFLOP",
        "ours: images/s",
        "batch",
        "TFLOP/s",
        "of the product",
        "predicted",
        "transformers: images/s",
        "batch",
    )
    for column in (*columns, "ratio"):
        table.add_column(column, justify="right")
    for side, row in found.items():
        ours, theirs = row["ours"], row["transformers"]
        table.add_row(
            f"{side}²",
            f"{row['tflop']:.3g}",
            f"{ours['items_per_s']:.1f}",
            str(ours["batch"]),
            f"{ours['tflop_s']:.1f}",
            f"{ours['tflop_s'] / gemm:.0%}",
            f"{predicted[side]['share']:.0%}" if side in predicted else "",
            f"{theirs['items_per_s']:.1f}",
            str(theirs["batch"]),
            f"{ours['items_per_s'] / theirs['items_per_s']:.2f}" if theirs["items_per_s"] else "",
        )
    return table


def service_table(name: str, found: dict[str, dict[str, Any]]) -> Table:
    """The service beside its floor."""
    table = Table(title=f"{name}: the service over loopback HTTP, unique JPEGs", min_width=100)
    columns = ("picture", "images/s", "of our floor", "p50 ms", "p99 ms", "GPU busy", "images per batch")
    for column in (*columns, "loop lag p99 ms", "front CPU ms per image"):
        table.add_column(column, justify="right")
    for side, slot in found.items():
        cpu = slot["cpu_s_per_item"]
        table.add_row(
            f"{side}²",
            f"{slot['items_per_s']:.1f}",
            f"{slot['over_our_floor']:.3f}",
            *(f"{slot['latency_s'][percent] * 1e3:.0f}" for percent in ("p50", "p99")),
            "" if slot["gpu_busy"] is None else f"{slot['gpu_busy']:.0%}",
            f"{slot['metrics']['items_per_batch']:.1f}",
            f"{slot['metrics']['loop_lag_p99_s'] * 1e3:.1f}",
            f"{(cpu['loop'] + cpu['threads']) * 1e3:.2f}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
