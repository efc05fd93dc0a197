"""How tensors lie in the arena."""

from __future__ import annotations

ALIGNMENT = 256
"""Bytes: every slot and every tensor begins at a multiple. A CUDA copy likes that, and no dtype needs more."""


def aligned(size: int) -> int:
    """`size` in bytes, rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT
