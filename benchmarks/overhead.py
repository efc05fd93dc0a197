"""What the engine adds to a forward: ZMQ there and back, and the arena. `uv run python -m benchmarks.overhead --tp 2`.

One small image is encoded over and over by a group of ranks, nothing else running. Added is what passes from copying
its tensors into the arena to having its embedding out of it, less the slowest rank's forward.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

from encode_server.bench.report import percentile
from encode_server.engine.arena import Arena
from encode_server.engine.group import GroupSpec, RankGroup
from encode_server.media.limits import MediaLimits
from encode_server.media.unique import jpeg
from encode_server.models.demo import demo_path
from encode_server.models.prepared import Prepared
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import open_directory
from encode_server.pipeline.jobs import Job
from encode_server.prepare.worker import ArenaWriter, described
from encode_server.runtime.forkserver import Forkserver
from encode_server.wire.modality import Modality

UNMEASURED = 20  # batches


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint directory [the demo's]")
    parser.add_argument("--tp", type=int, default=1, help="ranks [1]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto [cpu]")
    parser.add_argument("--size", type=int, default=56, help="side of the image in pixels [56]")
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
    writer = ArenaWriter(os.dup(arena.fd), arena.size)  # as in a preparer, but in this process
    item, tensors = described(prepared, [prepared])
    preloaded = json.dumps({"model": spec.path, "revision": None}).encode()
    forkserver = Forkserver("encode_server.models.preload:preload", preloaded)
    forkserver.start()
    keeper = asyncio.create_task(forkserver.run())
    group = RankGroup(spec, forkserver, arena, lambda rank, step: None, lambda rank, text: print(text))
    added: list[float] = []
    own: list[float] = []
    try:
        info = await group.start(300)
        for turn in range(batches + UNMEASURED):
            job = Job(arena, Modality.IMAGE, math.inf)
            offset = await job.acquire(item, info.dims[Modality.IMAGE], info.dtype)
            started = time.perf_counter()
            writer.write(tensors, offset)
            dones = await group.forward(Modality.IMAGE, tuple(piece.item for piece in job.pieces))
            job.copy_embedding()
            took = time.perf_counter() - started
            job.release()
            if failed := next((done.error for done in dones if done.error), None):
                raise RuntimeError(failed)
            if turn >= UNMEASURED:
                own.append(max(done.forward_s for done in dones))
                added.append(took - own[-1])
    finally:
        await group.stop()
        keeper.cancel()
        await asyncio.gather(keeper, return_exceptions=True)
        arena.close()
    return added, own


if __name__ == "__main__":
    sys.exit(main())
