"""One vector for a whole item, in place of its rows."""

from __future__ import annotations

from enum import StrEnum


class Pool(StrEnum):
    """How an item's rows become one vector. The value is the name used in requests.

    `MEAN`: the mean of all rows. `CLS`: the row of the class token, where the encoder has one. `MODEL`: the vector that
    the model itself makes for the whole item (SigLIP's attention head, CLIP's projection), where it has one.
    """

    MEAN = "mean"
    CLS = "cls"
    MODEL = "model"


POOLED = "pooled"
"""Name of the tensor that marks an item whose vector by the model itself is wanted; no processor uses the name."""

POOLED_TOKENS = "pooled_tokens"
"""In an item's `extra`: how many rows its one vector stands for."""
