"""When rows computed in two ways count as the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch

TOLERANCE = 1e-4
"""Largest difference in float32, relative to the largest value where that is above 1."""


def equal(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> bool:
    """Whether rows computed in two ways agree, item by item."""
    for one, other in zip(got, want, strict=True):
        if one.shape != other.shape or not torch.isfinite(one).all():
            return False
        if one.numel() and float((one - other).abs().max()) > TOLERANCE * max(1.0, float(other.abs().max())):
            return False
    return True
