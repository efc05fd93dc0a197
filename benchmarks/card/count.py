"""What a checkpoint's forward asks of a GPU: launches, bytes and operations, counted without weights or a GPU."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.card.device import emulated
from benchmarks.card.ledger import Kind, Launch
from encode_server.models import fused, gated
from encode_server.models.families import family_of
from encode_server.models.families.base import Family
from encode_server.models.gated import Gate, gate
from encode_server.models.linear import align_mlps
from encode_server.models.parallel import shard
from encode_server.models.resolve import open_directory
from encode_server.models.rotary import Rotation, rotate
from encode_server.models.speedups import Speedup, for_device, speed_up
from encode_server.models.weights import quiet
from encode_server.wire.modality import Modality

CUDA = torch.device("cuda:0")
BEFORE = frozenset(Speedup) - {Speedup.NORMS, Speedup.ROTARY, Speedup.GELU, Speedup.GATED, Speedup.AUDIO}
"""The speedups without those that fuse what transformers computes in several kernels."""


def count(
    directory: Path,
    modality: Modality,
    items: Sequence[Mapping[str, torch.Tensor]],
    *,
    speedups: Collection[Speedup] = frozenset(Speedup),
    triton: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    rank: int = 0,
    world: int = 1,
) -> list[Launch]:
    """Launches of one forward over `items`. `directory`: a configuration and processors of a family with rules of its
    own; its weights are not read. `triton`: the container has what Triton needs. With `world` > 1 torch.distributed's
    default group must exist, and may be torch's `fake` one."""
    family = family_of(open_directory(directory))
    with emulated(values=False) as device, _kernels(triton):
        model = _without_weights(family, speedups, dtype, rank, world)
        device.ledger.clear()
        with torch.inference_mode():
            family.forward(model, modality, items, CUDA)
        return list(device.ledger.launches)


def per_layer(launches: Sequence[Launch], longer: Sequence[Launch], layers: int) -> float:
    """Kernels of one layer: the difference between two towers of which one has `layers` more."""
    kernels = [sum(launch.kind is Kind.KERNEL for launch in some) for some in (launches, longer)]
    return (kernels[1] - kernels[0]) / layers


def write_config(config: Any, processors: Mapping[str, Any], directory: Path) -> Path:
    """A checkpoint's directory whose file of weights is empty."""
    directory.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(directory)
    save_file({}, directory / "model.safetensors")
    (directory / "processor_config.json").write_text(json.dumps(processors, default=lambda value: value.tolist()))
    return directory


def _without_weights(
    family: Family, speedups: Collection[Speedup], dtype: torch.dtype, rank: int, world: int
) -> nn.Module:
    with quiet(), torch.device("meta"):
        model_class, config = family.model_class()
        model: nn.Module = model_class(config).to(dtype)
    model.eval().requires_grad_(False)
    chosen = for_device(frozenset(speedups) & family.speedups, CUDA, dtype)
    if Speedup.ALIGN in chosen:
        align_mlps(model, world)
    shard(model, rank=rank, world=world, whole=family.whole)
    speed_up(model, chosen, CUDA)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = _placed(tensor)  # type: ignore[assignment]
    return model


def _placed(tensor: torch.Tensor) -> torch.Tensor:
    placed = torch.empty(tensor.shape, dtype=tensor.dtype, device=CUDA)
    return nn.Parameter(placed, requires_grad=False) if isinstance(tensor, nn.Parameter) else placed


@contextmanager
def _kernels(triton: bool) -> Iterator[None]:
    """While only counting, no kernel's values can be checked."""
    rotation: Rotation = rotate
    chosen: Gate = gate
    if triton:
        from encode_server.models.gated_triton import gate_in_one_kernel as chosen
        from encode_server.models.rotary_triton import rotate_in_one_kernel as rotation
    with (
        mock.patch.object(fused, "choose_rotation", lambda device: rotation),
        mock.patch.object(gated, "choose_gate", lambda device, activations: chosen),
    ):
        yield
