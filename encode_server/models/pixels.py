"""Patches as bytes on their way to the ranks, rescaled and normalised there.

A processor hands out float32 with each still image's frame repeated to fill a temporal patch: eight times the bytes
of the image. Asked for neither rescaling nor normalisation, the processor hands out the resized bytes; the ranks then
do those two steps, with the processor's own constants in its own order, so the values are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from encode_server.models.families.base import Item, gather


def raw_options(processor: Any) -> dict[str, bool]:
    """Keyword arguments that make the processor hand out bytes, where it would rescale and normalise them."""
    return {"do_rescale": False, "do_normalize": False} if processor.do_rescale and processor.do_normalize else {}


def constants(processor: Any) -> dict[str, torch.Tensor]:
    """`mean` and `std` of the processor's normalisation, float32 [channels], on the scale of bytes."""
    # As in transformers' fused rescaling and normalisation, down to the order of the operations.
    scale = 1.0 / processor.rescale_factor
    return {
        "mean": torch.tensor(processor.image_mean) * scale,
        "std": torch.tensor(processor.image_std) * scale,
    }


def pack(patches: torch.Tensor, processor: Any, *, still: bool) -> dict[str, torch.Tensor]:
    """The tensors of one item from the processor's patches [n, channels × frames × height × width].

    uint8 patches come with `constants`, and those of a still image keep one frame. Others are passed on as they are.
    """
    if patches.dtype is not torch.uint8:
        return {"pixel_values": patches.contiguous()}
    if still:
        frames = patches.view(len(patches), len(processor.image_mean), int(processor.temporal_patch_size), -1)
        patches = frames[:, :, 0].reshape(len(patches), -1)
    return {"pixel_values": patches.contiguous(), **constants(processor)}


def unpack(items: Sequence[Item], config: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The items' patches as the tower of this `config` takes them: [n, channels × frames × height × width]."""
    patches = gather(items, "pixel_values", device, torch.uint8 if "mean" in items[0] else dtype)
    if "mean" not in items[0]:
        return patches
    mean, std = (items[0][name].to(device, non_blocking=True)[None, :, None, None] for name in ("mean", "std"))
    values = patches.view(len(patches), mean.shape[1], -1, int(config.patch_size) ** 2).float().sub_(mean).div_(std)
    return values.expand(-1, -1, int(config.temporal_patch_size), -1).reshape(len(patches), -1).to(dtype)
