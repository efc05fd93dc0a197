"""A rank's encoder: loaded, sharded, and run batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from encode_server.errors import StartupError
from encode_server.models import attention
from encode_server.models.families import family_of
from encode_server.models.families.base import Family
from encode_server.models.families.generic import Generic
from encode_server.models.generic.discover import discover
from encode_server.models.linear import align_mlps
from encode_server.models.parallel import shard
from encode_server.models.quantised import check_unquantised
from encode_server.models.registry import check_tp, known, summarize
from encode_server.models.resolve import open_directory
from encode_server.models.speedups import Speedup, for_device, speed_up
from encode_server.wire.checkpoint import Facts
from encode_server.wire.modality import Modality
from encode_server.wire.pools import POOLED
from encode_server.wire.ranks import EncoderInfo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encoder:
    """The towers of one checkpoint on one device, as one rank of a tensor-parallel group holds them."""

    def __init__(self, family: Family, model: nn.Module, device: torch.device, info: EncoderInfo) -> None:
        self.info = info
        self._family = family
        self._model = model
        self._device = device

    @torch.inference_mode()
    def forward(self, modality: Modality, items: Sequence[Mapping[str, torch.Tensor]]) -> list[torch.Tensor]:
        """Encode a batch. `items`: each item's CPU tensors as `Prepared.tensors` has them, only read.

        Returns one [tokens, dim] tensor per item on the device, in the encoder's dtype. With several ranks every rank
        must make the same calls in the same order; each gets the whole result. An item that is marked as pooled
        (`wire.pools.POOLED`) gets the model's own vector, [1, width].
        """
        marked = [index for index, item in enumerate(items) if POOLED in item]
        if not marked:
            return self._family.forward(self._model, modality, items, self._device)
        plain = [index for index, item in enumerate(items) if POOLED not in item]
        rows: dict[int, torch.Tensor] = {}
        for indices, encode in ((plain, self._family.forward), (marked, self._family.pooled)):
            if indices:
                chosen = [items[index] for index in indices]
                rows.update(zip(indices, encode(self._model, modality, chosen, self._device), strict=True))
        return [rows[index] for index in range(len(items))]


def load_encoder(
    path: str, *, device: str, dtype: str, rank: int = 0, world: int = 1, facts: Facts | None = None
) -> Encoder:
    """Load the encoder of the checkpoint in directory `path` and keep the part of rank `rank` of `world`.

    `device`: torch's name. `dtype`: `float32`, `bfloat16` or `float16`. With `world` > 1 torch.distributed's default
    group must exist. `facts`: of this checkpoint's inspection; without them a family that has no rules of its own is
    inspected here, which takes longer than loading it. Code that comes with a checkpoint is never run.

    Raises:
        StartupError: unsupported or incomplete checkpoint, an encoder that is itself quantised, or a `world` that does
            not divide the attention heads of a family with rules of its own.
    """
    if dtype not in DTYPES:
        raise StartupError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    checkpoint = open_directory(Path(path))
    if known(checkpoint) is not None:
        check_tp(summarize(checkpoint), world)
    check_unquantised(checkpoint)
    family = family_of(checkpoint)
    if isinstance(family, Generic):
        family.facts = facts or discover(family, world)
    model: Any = family.load(DTYPES[dtype])
    target = torch.device(device)
    speedups = for_device(family.speedups, target, DTYPES[dtype])
    if Speedup.ALIGN in speedups:
        align_mlps(model, world)
    shard(model, rank=rank, world=world, whole=family.whole)
    speed_up(model, speedups - {Speedup.PACK}, target)
    model = model.to(target)
    if target.type == "cuda" and DTYPES[dtype] is not torch.float32:
        attention.flash_works(target)  # waits for the device, which a forward must not
    info = EncoderInfo(
        model_type=checkpoint.model_type,
        dims=family.dims(model),
        dtype=dtype,
        device=device,
        weight_bytes=sum(weight.nbytes for weight in model.parameters()),
        pooled=family.pooled_dims(model),
        class_token=family.class_token,
    )
    speed_up(model, speedups & {Speedup.PACK})
    return Encoder(family, model, target, info)
