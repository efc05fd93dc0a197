"""What the engine adds to a forward: ZMQ there and back, and the arena. `uv run python -m benchmarks.overhead --tp 2`.

One small picture is encoded over and over by a group of ranks, nothing else running. Added is what passes between
sending the command and the last rank's answer, less the slowest rank's own time for the batch.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from encode_server.bench.media import jpeg
from encode_server.bench.report import percentile
from encode_server.engine.arena import Arena
from encode_server.engine.group import GroupSpec, RankGroup
from encode_server.engine.messages import ItemRef, TensorRef
from encode_server.media.limits import MediaLimits
from encode_server.modality import Modality
from encode_server.models.checkpoint import open_directory
from encode_server.models.demo import demo_path
from encode_server.models.prepared import Prepared
from encode_server.models.preprocess import Preprocessor

ALIGNMENT = 64


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
        sizes = [tensor.numel() * tensor.element_size() + ALIGNMENT for tensor in prepared.tensors.values()]
        inputs, output = await arena.acquire((sum(sizes), prepared.tokens * dim * 4))
        references = []
        offset = inputs.offset
        for (name, tensor), size in zip(prepared.tensors.items(), sizes, strict=True):
            data = tensor.contiguous().view(-1).numpy().view(np.uint8)
            np.copyto(np.frombuffer(arena.view(offset, data.nbytes), np.uint8), data)
            kind = str(tensor.dtype).removeprefix("torch.")
            references.append(TensorRef(name, kind, tuple(tensor.shape), offset))
            offset += -(-size // ALIGNMENT) * ALIGNMENT - ALIGNMENT
        item = ItemRef(tuple(references), TensorRef("embedding", "float32", (prepared.tokens, dim), output.offset))
        for turn in range(batches + 20):
            started = time.perf_counter()
            dones = await group.forward(Modality.IMAGE, (item,))
            took = time.perf_counter() - started
            if failed := next((done.error for done in dones if done.error), None):
                raise RuntimeError(failed)
            if turn >= 20:
                own.append(max(done.forward_s + done.copy_s for done in dones))
                added.append(took - own[-1])
    finally:
        await group.stop()
        arena.close()
    return added, own


if __name__ == "__main__":
    sys.exit(main())
