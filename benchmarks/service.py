"""One load on one server: what came back, and what it cost where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import uvloop

from benchmarks.processes import ServerProcess
from benchmarks.prometheus import Look
from encode_server.bench.client import LoadClient
from encode_server.bench.load import Load, run_load
from encode_server.bench.report import LoadReport, Result
from encode_server.bench.source import LoadRequest

Progress = Callable[[float, LoadReport], None]


def measure(
    server: ServerProcess, requests: Iterator[LoadRequest], load: Load, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Load a server, ours or a naive one, and report.

    CPU times are of everything from the first request to the last answer, warm-up included, per item answered.
    """
    answered = 0

    def count(result: Result) -> None:
        nonlocal answered
        answered += result.request.items if result.ok else 0

    async def run() -> LoadReport:
        client = LoadClient(server.url, timeout_s=600)
        try:
            return await run_load(client, requests, load, on_result=count, on_progress=on_progress)
        finally:
            client.close()

    before = server.usage()
    report = uvloop.run(run())
    used = server.usage().since(before)
    per_item = {name: seconds / max(1, answered) for name, seconds in asdict(used).items()}
    return dict(report.document()) | {"answered": answered, "cpu_s_per_item": per_item}


def measure_ours(
    server: ServerProcess, requests: Iterator[LoadRequest], load: Load, on_progress: Progress | None = None
) -> dict[str, Any]:
    """As `measure`, with what our server's own metrics say of the same time."""
    before = server.look()
    document = measure(server, requests, load, on_progress)
    happened = server.look().since(before)
    cpu = stage_cpu(happened, document["answered"], document["cpu_s_per_item"])
    return document | {"metrics": summary(happened, document["answered"]), "stage_cpu_s": cpu}


def stage_cpu(happened: Look, answered: int, processes: dict[str, float]) -> dict[str, float]:
    """CPU seconds per item by stage. `front`: HTTP, fetching, batching, delivery. `messages`: what the preparers used
    beside their stages. `forward`: all of the ranks'."""
    items = max(1, answered)
    stages = {
        stage: happened.total("encode_stage_cpu_seconds_total", stage=stage) / items
        for stage in happened.labels("encode_stage_cpu_seconds_total", "stage")
    }
    messages = max(0.0, processes["preparers"] - sum(stages.values()))
    front = processes["loop"] + processes["threads"]
    return {"front": front, **stages, "messages": messages, "forward": processes["ranks"]}


def summary(happened: Look, answered: int) -> dict[str, Any]:
    """Of a difference of two looks at `/metrics`: times in seconds, per item where it says so."""
    items = max(1, answered)
    batches = happened.total("encode_batch_tokens_count")
    wall = {
        stage: happened.total("encode_stage_seconds_sum", stage=stage)
        / max(1.0, happened.total("encode_stage_seconds_count", stage=stage))
        for stage in happened.labels("encode_stage_seconds_count", "stage")
    }
    return {
        "loop_lag_p99_s": happened.quantile("encode_loop_lag_seconds", 0.99),
        "preprocessed_per_item": happened.total("encode_preprocessed_items_total") / items,
        "batches": batches,
        "items_per_batch": answered / batches if batches else 0.0,
        "stage_wall_s": wall,
    }
