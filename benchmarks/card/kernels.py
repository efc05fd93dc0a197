"""Operators that only CUDA has, computed on the CPU."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional

aten = torch.ops.aten


def execute(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` over CPU tensors, in the form of its result on CUDA."""
    if func is aten._flash_attention_forward.default:
        return _flash_packed(*args[:7], scale=kwargs.get("scale"))
    if func is aten._scaled_dot_product_flash_attention.default:
        return _flash(*args[:3], scale=kwargs.get("scale"))
    if func is aten._fused_rms_norm.default:
        return _rms_norm(*args)
    if func is aten._addmm_activation.default and kwargs.get("use_gelu"):
        return functional.gelu(torch.addmm(*args).float(), approximate="tanh").to(args[1].dtype)
    return func(*args, **kwargs)


def _flash_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float | None,
) -> tuple[torch.Tensor, ...]:
    """[tokens, heads, dim] each. What the kernel would only notice by reading beyond its memory is asserted."""
    bounds = cu_q.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    assert bounds == cu_k.tolist() and bounds[0] == 0 and bounds[-1] == len(q) == len(k), "segments beyond the batch"
    assert cu_q.dtype is torch.int32 and min(longest_q, longest_k) >= max(lengths), "a segment longer than the longest"
    assert all(t.stride(-1) == 1 and t.dtype in (torch.float16, torch.bfloat16) for t in (q, k, v)), "not a flash input"
    out = torch.empty(q.shape, dtype=q.dtype)
    for start, end in pairwise(bounds):
        parts = [t[start:end].transpose(0, 1)[None].float() for t in (q, k, v)]
        rows = functional.scaled_dot_product_attention(*parts, scale=scale)
        out[start:end] = rows[0].transpose(0, 1).to(q.dtype)
    return (out, *[torch.zeros(0) for _ in range(4)])


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None) -> tuple[torch.Tensor, ...]:
    """[batch, heads, tokens, dim] each."""
    out = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).to(q.dtype)
    return (out, *[torch.zeros(0) for _ in range(4)])


def _rms_norm(
    hidden: torch.Tensor, shape: list[int], weight: torch.Tensor | None, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the CUDA kernel: everything in float32, rounded once."""
    wide = hidden.float()
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + (eps or torch.finfo(hidden.dtype).eps))
    out = wide * inverse * (1 if weight is None else weight.float())
    return out.to(hidden.dtype), inverse
