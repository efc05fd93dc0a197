"""What the engine adds to a forward: ZMQ there and back, and the arena. `uv run python -m benchmarks.overhead --tp 2`.

One small picture is encoded over and over by a group of ranks, nothing else running. Added is what passes from copying
its tensors into the arena to having its embedding out of it, less the slowest rank's forward.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import sys
import time
from pathlib import Path

from encode_server.pipeline.work import Placement, room_for

from encode_server.bench.report import percentile
from encode_server.engine.arena import Arena
from encode_server.engine.group import GroupSpec, RankGroup
from encode_server.media.limits import MediaLimits
from encode_server.media.unique import jpeg
from encode_server.models.checkpoint import open_directory
from encode_server.models.demo import demo_path
from encode_server.models.prepared import Prepared
from encode_server.models.preprocess import Preprocessor
from encode_server.wire.modality import Modality


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint directory [the demo's]")
    parser.add_argument("--tp", type=int, default=1, help="ranks [1]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto [cpu]")
    parser.add_argument("--size", type=int, default=56, help="side of the picture in pixels [56]")
    parser.add_argument("--batches", type=int, default=500, help="[500]")
    args = parser.parse_args(argv)
    path = args.model or demo_path()
    prepared = Preprocessor(open_directory(path), MediaLimits()).prepare(
        Modality.IMAGE, jpeg(args.size, args.size).copy()
    )
    threads = max(1, (os.cpu_count() or 1) // args.tp)
    spec = GroupSpec(str(path), args.tp, args.device, "float32", "float32", threads)
    added, own = asyncio.run(_measure(spec, prepared, args.batches))
    p50, p99 = (percentile(sorted(added), percent) * 1e3 for percent in (50, 99))
    print(
        f"{args.tp} rank(s), {args.size}²: a batch takes a rank {statistics.median(own) * 1e3:.2f} ms; ZMQ and arena "
        f"add {p50:.2f} ms (p50), {p99:.2f} ms (p99) over {len(added)} batches"
    )
    return 0


async def _measure(spec: GroupSpec, prepared: Prepared, batches: int) -> tuple[list[float], list[float]]:
    """Seconds added to each batch, and the slowest rank's own."""
    arena = Arena(64 << 20)
    group = RankGroup(spec, arena, lambda rank, step: None)
    added: list[float] = []
    own: list[float] = []
    try:
        info = await group.start(300)
        dim = info.dims[Modality.IMAGE]
        for turn in range(batches + 20):
            slots = await arena.acquire(room_for([prepared], dim, info.dtype))
            placement = Placement(arena, Modality.IMAGE, math.inf, slots)
            started = time.perf_counter()
            placement.fill([prepared], dim, info.dtype)
            (work,) = placement.works
            dones = await group.forward(Modality.IMAGE, (work.item,))
            placement.copy_embedding()
            took = time.perf_counter() - started
            placement.release()
            if failed := next((done.error for done in dones if done.error), None):
                raise RuntimeError(failed)
            if turn >= 20:
                own.append(max(done.forward_s for done in dones))
                added.append(took - own[-1])
    finally:
        await group.stop()
        arena.close()
    return added, own


if __name__ == "__main__":
    sys.exit(main())
