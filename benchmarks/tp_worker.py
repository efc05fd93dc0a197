"""One rank of a tensor-parallel check: encodes the items of a file, writes the embeddings, says how long it took."""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from encode_server.models.encoder import load_encoder
from encode_server.wire.modality import Modality


def main() -> int:
    """Run the rank."""
    parser = argparse.ArgumentParser(prog="benchmarks.tp_worker")
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--backend", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="holds `inputs`; `store` and `outputsN` go there")
    args = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False  # it is on for convolutions, and not exact enough to compare with
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    else:
        torch.set_num_threads(1)
    started = time.perf_counter()
    store = dist.FileStore(str(args.folder / "store"), args.world)  # type: ignore[attr-defined]
    dist.init_process_group(
        args.backend, store=store, rank=args.rank, world_size=args.world, timeout=timedelta(seconds=90)
    )
    one = torch.ones(1, device=args.device)
    dist.all_reduce(one)  # communicators are made by the first collective
    joined = time.perf_counter() - started
    assert int(one) == args.world

    encoder = load_encoder(args.model, device=args.device, dtype=args.dtype, rank=args.rank, world=args.world)
    items: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in sorted(load_file(args.folder / "inputs").items()):
        item, _, name = key.partition("/")
        items.setdefault(item, {})[name] = tensor
    batch = list(items.values())
    embeddings = [part.cpu().clone() for part in encoder.forward(Modality.IMAGE, batch)]
    started = time.perf_counter()
    for part in encoder.forward(Modality.IMAGE, batch):
        part.cpu()
    facts = {"join_s": joined, "forward_s": time.perf_counter() - started}
    save_file({str(index): part for index, part in enumerate(embeddings)}, args.folder / f"outputs{args.rank}")
    print(json.dumps(facts))
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
