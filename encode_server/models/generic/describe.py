"""What an item costs, and what an engine must know of it beside its embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from encode_server.models.generic.joining import TOKENS
from encode_server.models.generic.media import Processed
from encode_server.models.prepared import Prepared
from encode_server.wire.modality import Modality

_GRID = "grid_thw"
_SMALL = 64
"""Numbers of a tensor that is told to the engine: sizes, grids, counts, and never pixels."""


def describe(processed: Processed, modality: Modality, processor: Any) -> Prepared:
    """The item as ranks and engines are told of it. `processor`: the part that handled it."""
    tensors = processed.tensors
    grids = next((tensor for name, tensor in tensors.items() if name.endswith(_GRID) and tensor.dim() == 2), None)
    cost, pairs = processed.tokens, 0
    if grids is not None:
        cost = int(grids.prod(-1).sum())
        pairs = int((grids[:, 0] * (grids[:, 1] * grids[:, 2]) ** 2).sum())
    elif modality is Modality.AUDIO:
        cost = max(
            (tensor.shape[-1] * tensor.shape[0] for tensor in tensors.values() if tensor.dim() == 3), default=cost
        )
    else:
        pixels = [tensor for name, tensor in tensors.items() if name.startswith("pixel_values")]
        cost = max([cost, *(_patches(tensor, processor) for tensor in pixels)])
    return Prepared(
        tensors={**processed.taken(), TOKENS: torch.tensor(processed.tokens)},
        tokens=processed.tokens,
        cost=cost,
        pairs=pairs,
        grid_thw=_one_grid(grids),
        extra=_extra(tensors),
    )


def _patches(pixels: torch.Tensor, processor: Any) -> int:
    """Patches of images [..., height, width], or of what is patches already [..., patches, values]."""
    if pixels.dim() < 4:
        return int(pixels.shape[:-1].numel())
    side = getattr(processor, "patch_size", None)
    side = side if isinstance(side, int) else 14  # of most towers; the cost only has to be comparable
    return int(pixels.shape[:-3].numel() * (pixels.shape[-2] // side) * (pixels.shape[-1] // side))


def _one_grid(grids: torch.Tensor | None) -> tuple[int, int, int] | None:
    if grids is None or grids.shape != (1, 3):
        return None
    t, h, w = grids[0].tolist()
    return int(t), int(h), int(w)


def _extra(tensors: Mapping[str, torch.Tensor]) -> dict[str, float | int | list[float]]:
    extra: dict[str, float | int | list[float]] = {}
    for name, tensor in tensors.items():
        if name.endswith(_GRID) and tensor.shape == (1, 3):
            continue  # told as the item's grid
        if not tensor.is_floating_point() and tensor.dtype is not torch.bool and tensor.numel() <= _SMALL:
            extra[name] = (
                tensor.item() if tensor.numel() == 1 else [float(value) for value in tensor.flatten().tolist()]
            )
    return extra
