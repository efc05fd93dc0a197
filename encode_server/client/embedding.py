"""The embedding of one request as the caller holds it: raw bytes and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from encode_server.client.errors import ProtocolError
from encode_server.delivery.frames import ItemInfo
from encode_server.modality import Modality

if TYPE_CHECKING:
    import numpy as np
    import torch

ITEM_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes per element of each dtype an embedding may have."""


def check_size(dtype: str, shape: tuple[int, int], nbytes: int) -> None:
    """Raises `ProtocolError` unless `nbytes` bytes are exactly one `shape` = [tokens, dim] array of `dtype`."""
    if dtype not in ITEM_SIZES:
        raise ProtocolError(f"unknown dtype {dtype!r}")
    tokens, dim = shape
    if tokens < 0 or dim < 0 or tokens * dim * ITEM_SIZES[dtype] != nbytes:
        raise ProtocolError(f"{nbytes} bytes are not a {dtype} array of shape {list(shape)}")


@dataclass(frozen=True, eq=False, slots=True)
class Embedding:
    """`shape` = [tokens, dim] values of `dtype` (`float32`, `float16`, `bfloat16`), row-major little-endian in `data`.

    `items` are the media items in the order of the rows: the first `items[0].tokens` rows belong to `items[0]`, and so
    on. `data` is the buffer that came from the network, not a copy of it.

    Raises `ProtocolError` when `data` does not hold exactly `shape` values of `dtype`.
    """

    req_id: str
    model: str
    modality: Modality
    dtype: str
    shape: tuple[int, int]
    items: tuple[ItemInfo, ...]
    data: memoryview = field(repr=False)

    def __post_init__(self) -> None:
        check_size(self.dtype, self.shape, self.data.nbytes)

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values as an array [tokens, dim].

        float32 and float16: a view of `data`. bfloat16, which numpy lacks: a float32 copy, exact, twice the size;
        `torch()` or `data` have it unconverted.
        """
        import numpy as np

        if self.dtype == "bfloat16":
            upper_half = np.frombuffer(self.data, dtype="<u2").astype("<u4")
            return (upper_half << 16).view("<f4").reshape(self.shape)
        return np.frombuffer(self.data, dtype=f"<f{ITEM_SIZES[self.dtype]}").reshape(self.shape)

    def torch(self) -> torch.Tensor:
        """The values as a CPU tensor [tokens, dim] of their own dtype, sharing `data` unless that is read-only.

        Imports torch, which takes seconds the first time.
        """
        import numpy as np
        import torch

        raw = np.frombuffer(self.data, dtype="<i4" if self.dtype == "float32" else "<i2")
        if not raw.flags.writeable:
            raw = raw.copy()
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.from_numpy(raw).view(dtype).reshape(self.shape)
