"""Rotary positions applied in place to the q and k parts of a fused projection, in as few passes as torch offers.

transformers computes them in float32 over copies of q and k: 14 kernels, which move 13 times the bytes of q and k in
bfloat16. The four kernels here move 3.5 times as many, Triton's one kernel moves them once in and once out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from encode_server.models.choice import choose

Rotation = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
"""Changes `qk` [tokens, 2, heads, dim] in place. `cos`, `sin`: float32 [tokens, dim]."""


def rotate(qk: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """The values of transformers' `apply_rotary_pos_emb_vision`: products and sums in float32, rounded once."""
    half = qk.shape[-1] // 2
    cos, sin = cos[:, None, None], sin[:, None, None]
    first, second = qk[..., :half], qk[..., half:]
    # Both products of the first half come before either half is written over.
    from_first = first * cos[..., :half]
    into_second = first * sin[..., half:]
    torch.addcmul(from_first, second, sin[..., :half], value=-1, out=first)
    torch.addcmul(into_second, second, cos[..., half:], out=second)


def choose_rotation(device: torch.device) -> Rotation:
    """The fastest rotation that works on `device`: Triton's if it gives the values of `rotate` there."""

    def in_one_kernel() -> Rotation:
        from encode_server.models.rotary_triton import rotate_in_one_kernel

        check(rotate_in_one_kernel, device)
        return rotate_in_one_kernel

    plain: Rotation = rotate
    return choose(device, plain, in_one_kernel, "rotary positions take four kernels, not Triton's one")


def check(rotation: Rotation, device: torch.device) -> None:
    """Raise ValueError where `rotation` does not give the values of `rotate`, for two dtypes and an uneven width."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.randn(5, 3, 2, 72, generator=generator).to(dtype)
        cos, sin = torch.randn(2, 5, 72, generator=generator)
        got = qkv.clone().to(device)
        rotation(got[:, :2], cos.to(device), sin.to(device))
        rotate(qkv[:, :2], cos, sin)
        error = float((got.cpu().float() - qkv.float()).abs().max())
        if not error <= (1e-5 if dtype is torch.float32 else 0.04):  # one bfloat16 step at 8
            raise ValueError(f"off by {error:.1e} in {dtype}")
