"""Real rank processes over gloo: each loads its part of several checkpoints and encodes the inputs found in a file."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file, save_file

from encode_server.wire.checkpoint import Facts
from encode_server.wire.modality import Modality

Jobs = Mapping[str, tuple[Path, Mapping[Modality, Sequence[Mapping[str, torch.Tensor]]]]]
"""Name → directory of a checkpoint, and its batches by modality."""


def encode_with_ranks(
    jobs: Jobs,
    world: int,
    scratch: Path,
    *,
    facts: Mapping[str, Facts | None] | None = None,
    like_a_gpu: bool = False,
    timeout_s: float = 220,
) -> list[dict[str, torch.Tensor]]:
    """Per rank: `name/modality/item` → embedding. `facts`: of the checkpoints that were inspected. `like_a_gpu`: the
    models are changed as for a GPU, and run on the CPU all the same."""
    inputs = {
        f"{name}/{modality}/{index:03}/{key}": tensor
        for name, (_, batches) in jobs.items()
        for modality, items in batches.items()
        for index, item in enumerate(items)
        for key, tensor in item.items()
    }
    save_file(inputs, scratch / "inputs")
    (scratch / "facts").write_bytes(msgspec.msgpack.encode(facts or {}))
    paths = {name: str(path) for name, (path, _) in jobs.items()}
    context = multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_rank, args=(rank, world, paths, str(scratch), like_a_gpu), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout_s)
    codes = [process.exitcode for process in ranks]
    for process in ranks:
        process.kill()
    assert codes == [0] * world, f"exit codes of the ranks: {codes}"
    return [load_file(scratch / f"outputs{rank}") for rank in range(world)]


def _rank(rank: int, world: int, paths: Mapping[str, str], scratch: str, like_a_gpu: bool) -> None:
    import torch.distributed as dist

    from encode_server.models import speedups
    from encode_server.models.encoder import load_encoder

    if like_a_gpu:
        speedups.OF_A_GPU = frozenset()
    torch.set_num_threads(1)
    store = dist.FileStore(f"{scratch}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    batches: dict[tuple[str, str], dict[str, dict[str, torch.Tensor]]] = {}
    for key, tensor in sorted(load_file(f"{scratch}/inputs").items()):
        name, modality, index, part = key.split("/")
        batches.setdefault((name, modality), {}).setdefault(index, {})[part] = tensor
    outputs = {}
    facts = msgspec.msgpack.decode(Path(scratch, "facts").read_bytes(), type=dict[str, Facts | None])
    for name, path in paths.items():
        encoder = load_encoder(path, device="cpu", dtype="float32", rank=rank, world=world, facts=facts.get(name))
        for (owner, modality), items in batches.items():
            if owner == name:
                for index, embedding in enumerate(encoder.forward(Modality(modality), list(items.values()))):
                    outputs[f"{name}/{modality}/{index}"] = embedding.clone()
    save_file(outputs, f"{scratch}/outputs{rank}")
    dist.destroy_process_group()
