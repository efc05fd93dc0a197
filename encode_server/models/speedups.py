"""Changes to a loaded model that make it faster and leave what it computes alone."""

from __future__ import annotations

from collections.abc import Callable, Collection
from enum import StrEnum
from functools import partial

import torch
from torch import nn

from encode_server.models.attention import use_segment_attention
from encode_server.models.convolutions import replace_audio_convolutions
from encode_server.models.fused import fuse_gelu, fuse_norms, fuse_rotary
from encode_server.models.gated import fuse_gated
from encode_server.models.linear import pack_linears, replace_patch_convolutions


class Speedup(StrEnum):
    """SEGMENTS: attention by packed segments. PATCHES: patch convolutions as products. ROTARY: rotary positions in
    place. NORMS, GELU, GATED, AUDIO: norms, activations, gated MLPs and audio convolutions as a GPU likes them. PACK:
    Linears as the CPU likes them. ALIGN: widths as a GPU likes them."""

    SEGMENTS = "segments"
    PATCHES = "patches"
    ROTARY = "rotary"
    NORMS = "norms"
    GELU = "gelu"
    GATED = "gated"
    AUDIO = "audio"
    PACK = "pack"
    ALIGN = "align"


OF_A_GPU = frozenset({Speedup.NORMS, Speedup.GELU, Speedup.GATED, Speedup.AUDIO, Speedup.ALIGN})
"""What makes nothing faster on a CPU."""


def for_device(chosen: Collection[Speedup], device: torch.device, dtype: torch.dtype) -> frozenset[Speedup]:
    """Those of `chosen` that make a model of `dtype` faster on `device`."""
    if device.type == "cuda":
        return frozenset(chosen) - {Speedup.PACK}
    # A CPU converts every operand of a mixed product in a pass of its own.
    mixed = {Speedup.ROTARY} if dtype is not torch.float32 else set()
    return frozenset(chosen) - OF_A_GPU - mixed


def speed_up(model: nn.Module, chosen: Collection[Speedup], device: torch.device | None = None) -> None:
    """Apply the `chosen` changes in place, those to the attention first; `ALIGN` comes before sharding and not here.

    `device`: where the model, which is on the CPU, will run; none: on the CPU.
    """
    target = device or torch.device("cpu")
    changes: dict[Speedup, Callable[[nn.Module], None]] = {
        Speedup.SEGMENTS: use_segment_attention,
        Speedup.PATCHES: replace_patch_convolutions,
        Speedup.ROTARY: partial(fuse_rotary, device=target),
        Speedup.NORMS: fuse_norms,
        Speedup.GELU: fuse_gelu,
        Speedup.GATED: partial(fuse_gated, device=target),
        Speedup.AUDIO: replace_audio_convolutions,
        Speedup.PACK: pack_linears,
    }
    for speedup, change in changes.items():
        if speedup in chosen:
            change(model)
