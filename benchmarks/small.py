"""The small yardsticks: time to start, time to import, memory over many requests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import uvloop

from benchmarks import procfs
from benchmarks.processes import ServerProcess, server
from benchmarks.service import Progress
from encode_server.bench.client import LoadClient
from encode_server.bench.load import Load, run_load
from encode_server.bench.report import Result
from encode_server.bench.source import LoadRequest

LOOKS = 50


def start_seconds() -> float:
    """From the command `encode-server demo` to a good answer of `/health`."""
    with server(["encode_server.cli", "demo"], ready_path="/health") as demo:
        return demo.start_s


def import_seconds() -> float:
    """What `import encode_server.client` takes in a fresh interpreter, the best of five."""
    program = "import time; t = time.perf_counter(); import encode_server.client; print(time.perf_counter() - t)"
    return min(float(subprocess.check_output([sys.executable, "-c", program])) for _ in range(5))


def memory(
    ours: ServerProcess, requests: Iterator[LoadRequest], count: int, on_progress: Progress | None = None
) -> dict[str, Any]:
    """The front's own memory while `count` requests go through, in bytes: at `LOOKS` times, and where it went.

    `per_1000_requests`: the slope of a line through the second half of it.
    """
    pid = ours.process.pid
    looks: list[tuple[int, int]] = []
    done = 0

    def look(_: Result) -> None:
        nonlocal done
        done += 1
        if done % max(1, count // LOOKS) == 0:
            looks.append((done, procfs.rss_bytes(pid)))

    async def run() -> None:
        client = LoadClient(ours.url)
        await run_load(client, requests, Load(8, seconds=86_400, count=count), on_result=look, on_progress=on_progress)
        client.close()

    first = procfs.rss_bytes(pid)
    uvloop.run(run())
    half = looks[len(looks) // 2 :]
    return {
        "requests": count,
        "before": first,
        "half": half[0][1],
        "after": looks[-1][1],
        "per_1000_requests": 1000 * slope(half),
        "looks": looks,
    }


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line."""
    if len(points) < 2:
        return 0.0
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
