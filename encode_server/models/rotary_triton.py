"""Rotary positions as one Triton kernel, and the torch operator around it. Importing needs Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from encode_server.models.rotary import rotate


@triton.jit  # type: ignore[untyped-decorator]
def rotate_kernel(  # type: ignore[no-untyped-def]
    qk, cos, sin, stride_token, stride_part, stride_head, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """One token's one head of q or of k, in place. Grid: tokens, 2 × heads. BLOCK: a power of two of at least HALF."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    column = tl.arange(0, BLOCK)
    inside = column < HALF
    row = qk + token * stride_token + part * stride_part + head * stride_head + column
    angle = token * 2 * HALF + column
    first = tl.load(row, mask=inside).to(tl.float32)
    second = tl.load(row + HALF, mask=inside).to(tl.float32)
    cos_first, cos_second = tl.load(cos + angle, mask=inside), tl.load(cos + angle + HALF, mask=inside)
    sin_first, sin_second = tl.load(sin + angle, mask=inside), tl.load(sin + angle + HALF, mask=inside)
    tl.store(row, (first * cos_first - second * sin_first).to(qk.dtype.element_ty), mask=inside)
    tl.store(row + HALF, (second * cos_second + first * sin_second).to(qk.dtype.element_ty), mask=inside)


def launch(kernel: Any, qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`kernel` over `qk` [tokens, 2, heads, dim], whose last dimension is contiguous; `cos`, `sin` [tokens, dim]."""
    tokens, parts, heads, dim = qk.shape
    assert qk.stride(3) == 1 and parts == 2 and cos.shape == sin.shape == (tokens, dim)
    kernel[(tokens, parts * heads)](
        qk,
        cos.contiguous(),
        sin.contiguous(),
        *qk.stride()[:3],
        HEADS=heads,
        HALF=dim // 2,
        BLOCK=triton.next_power_of_2(dim // 2),
        num_warps=1,
    )


def _on_cuda(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    launch(rotate_kernel, qk, cos, sin)


# An operator of torch's, so that profiles name it, and so that programs that intercept operators see one.
_library: Any = torch.library.Library("encode_server", "DEF")  # type: ignore[no-untyped-call]
_library.define("rotate_(Tensor(a!) qk, Tensor cos, Tensor sin) -> ()")
_library.impl("rotate_", _on_cuda, "CUDA")
_library.impl("rotate_", rotate, "CPU")
_library.impl("rotate_", lambda qk, cos, sin: None, "Meta")


def rotate_in_one_kernel(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """As `rotary.rotate`."""
    torch.ops.encode_server.rotate_(qk, cos, sin)
