"""Changes to a loaded model that make it faster and leave what it computes alone."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from torch import nn

from encode_server.models.attention import use_segment_attention
from encode_server.models.linear import pack_linears, replace_patch_convolutions


class Speedup(StrEnum):
    """SEGMENTS: attention by packed segments. PATCHES: patch convolutions as products. PACK: Linears as the CPU likes
    them. ALIGN: widths as a GPU likes them."""

    SEGMENTS = "segments"
    PATCHES = "patches"
    PACK = "pack"
    ALIGN = "align"


def speed_up(model: nn.Module, chosen: Collection[Speedup]) -> None:
    """Apply the `chosen` changes in place, those to the attention first; `ALIGN` comes before sharding and not here."""
    for speedup, change in (
        (Speedup.SEGMENTS, use_segment_attention),
        (Speedup.PATCHES, replace_patch_convolutions),
        (Speedup.PACK, pack_linears),
    ):
        if speedup in chosen:
            change(model)
