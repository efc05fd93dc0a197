"""Attention over packed segments, registered with transformers: never a dense mask over a batch.

transformers hands `cu_seqlens` only to an implementation whose name contains "flash", hence the name here.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from encode_server.errors import first_line
from encode_server.models.transfer import to_device

log = logging.getLogger(__name__)

IMPLEMENTATION = "encode_server_flash_segments"
_LAYOUT = "_encode_server_layout"
MOST_OFF = 0.05  # of a row of attention over values of about 1; bfloat16 rounds to 0.01


class Segments:
    """Where the attention segments of one packed batch begin and end, computed once for all layers."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        """`lengths`: tokens of each segment, in order, as they lie in the packed batch."""
        self.lengths = tuple(lengths)
        self.longest = max(self.lengths)
        self.cu_seqlens = to_device(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32), device)

    @cached_property
    def groups(self) -> list[torch.Tensor]:
        """For each distinct length, the packed positions of its segments: int64 [segments, length]."""
        starts: dict[int, list[int]] = {}
        for start, length in zip([0, *accumulate(self.lengths)], self.lengths, strict=False):
            starts.setdefault(length, []).append(start)
        device = self.cu_seqlens.device
        return [
            to_device(torch.tensor(begin), device)[:, None] + torch.arange(length, device=device)
            for length, begin in starts.items()
        ]


def use_segment_attention(model: nn.Module) -> None:
    """Make `model`, and every model inside it, attend with this implementation.

    Padded batches keep their masks: transformers makes none for an implementation that it knows no mask function of.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, segment_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, sdpa_mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = IMPLEMENTATION


def segment_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    segments: Sequence[Segments] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q, k, v [1, heads, tokens, dim] → [1, tokens, heads, dim].

    `segments` holds the batch's layouts (full and windowed); the layer's `cu_seq_lens_q` says which one it means.
    Layers without segments get plain scaled-dot-product attention, under the mask of a padded batch if there is one
    (bool, true where a key is attended to, broadcast to [batch, heads, queries, keys]).
    """
    if cu_seq_lens_q is None:
        if attention_mask is None and _has_flash(query):
            return _flash(query, key, value, scaling).transpose(1, 2), None
        output = functional.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
        return output.transpose(1, 2), None
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    return attend_packed(q, k, v, layout_of(cu_seq_lens_q, segments), scaling).unsqueeze(0), None


def layout_of(cu_seqlens: torch.Tensor, segments: Sequence[Segments]) -> Segments:
    """The layout of `segments` that has these very boundaries, or a new one, for which the host waits.

    A new layout stays with its boundaries, so that a tower whose family makes none waits in its first layer alone.
    """
    for known in segments:
        if known.cu_seqlens is cu_seqlens:
            return known
    if not hasattr(cu_seqlens, _LAYOUT):
        setattr(cu_seqlens, _LAYOUT, Segments(cu_seqlens.diff().tolist(), cu_seqlens.device))
    layout: Segments = getattr(cu_seqlens, _LAYOUT)
    return layout


def attend_packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Segments, scaling: float | None
) -> torch.Tensor:
    """Attention within each segment of a packed batch: [tokens, heads, dim] each, and so the result."""
    attend = _varlen if _has_flash(q) else _grouped
    return attend(q, k, v, layout, scaling)


def _has_flash(q: torch.Tensor) -> bool:
    """Whether torch's flash kernel takes these states: half precision, heads of a multiple of 8, Ampere or later (or an
    AMD GPU, whose capability says nothing), where the kernel works."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
        and flash_works(q.device)
    )


@cache
def flash_works(device: torch.device) -> bool:
    """Whether torch's flash kernels give right rows on this GPU, tried once by each process; the first call waits.

    Builds of torch lack these kernels for some GPUs, of AMD's above all, and show that when the kernels are called.
    """
    lengths, generator = (64, 33), torch.Generator().manual_seed(0)
    try:
        for dim in (72, 80):  # of Qwen's towers; the kernels compute both as heads of 96
            states = torch.randn(3, sum(lengths), 2, dim, generator=generator).bfloat16()
            q, k, v = states.float()
            want = _grouped(q, k, v, Segments(lengths, torch.device("cpu")), None)
            q, k, v = states.to(device)
            packed = _varlen(q, k, v, Segments(lengths, device), None)
            # The first segment alone, in the form for padded batches.
            q, k, v = (part[None, : lengths[0]].transpose(1, 2) for part in (q, k, v))
            padded = _flash(q, k, v, None)[0].transpose(0, 1)
            for got, rows in ((packed, want), (padded, want[: lengths[0]])):
                error = float((got.cpu().float() - rows).abs().max())
                if not error <= MOST_OFF:
                    raise ValueError(f"heads of {dim} are off by {error:.1e}")
    except Exception as error:
        log.warning("attention takes a call for each length of segment, not one flash kernel: %s", first_line(error))
        return False
    return True


def _grouped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Segments, scaling: float | None
) -> torch.Tensor:
    """[tokens, heads, dim] each; one scaled-dot-product call per distinct segment length."""
    if len(layout.groups) == 1:
        return _batched(q, k, v, len(layout.lengths), scaling)
    output = torch.empty_like(q)
    for positions in layout.groups:
        flat = positions.flatten()
        output[flat] = _batched(q[flat], k[flat], v[flat], len(positions), scaling)
    return output


def _batched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int, scaling: float | None) -> torch.Tensor:
    """`count` equally long segments, packed: [count × length, heads, dim]."""
    q, k, v = (states.reshape(count, -1, *states.shape[1:]).transpose(1, 2) for states in (q, k, v))
    output = functional.scaled_dot_product_attention(q, k, v, scale=scaling)
    return output.transpose(1, 2).flatten(0, 1)


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Segments, scaling: float | None) -> torch.Tensor:
    """[tokens, heads, dim] each; torch's flash kernel over packed segments.

    By its operator: `torch.nn.attention.varlen.varlen_attn` of torch 2.15 prefers cuDNN on Hopper and Blackwell, which
    plans anew for every new number of tokens or segments, for tens of milliseconds, and keeps every plan. Batches of
    images hardly ever repeat both.
    """
    cu, longest = layout.cu_seqlens, layout.longest
    output: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, False, False, scale=scaling
    )[0]
    return output


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """[batch, heads, tokens, dim] each; by its operator for the same reason."""
    output: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scaling)[0]
    return output
