"""The embedding of one request as the caller holds it: raw bytes and what they mean."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from encode_server.client.errors import ProtocolError
from encode_server.wire.dtypes import ITEM_BYTES
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality

if TYPE_CHECKING:
    import numpy as np
    import torch


async def in_order(req_id: str, parts: Sequence[tuple[Sequence[int], Embedding]]) -> Embedding:
    """One embedding from several, each with the places its items have in the whole.

    A single part keeps its memory, several are joined by one copy in a thread. Raises `ProtocolError` when they differ
    in model, modality, dtype or dim, or hold other items than those.
    """
    first = parts[0][1]
    if len({(part.model, part.modality, part.dtype, part.shape[1]) for _, part in parts}) > 1:
        raise ProtocolError(f"the parts of {req_id!r} differ in model, modality, dtype or dim")
    items: dict[int, tuple[ItemInfo, memoryview]] = {}
    for places, part in parts:
        if len(places) != len(part.items):
            raise ProtocolError(f"{len(part.items)} items came for {req_id!r} where {len(places)} were expected")
        items |= zip(places, zip(part.items, part.rows_of_items(), strict=True), strict=True)
    ordered = [items[place] for place in sorted(items)]
    data = first.data if len(parts) == 1 else await asyncio.to_thread(join, [rows for _, rows in ordered])
    return Embedding(
        req_id=req_id,
        model=first.model,
        modality=first.modality,
        dtype=first.dtype,
        shape=(sum(part.shape[0] for _, part in parts), first.shape[1]),
        items=tuple(info for info, _ in ordered),
        data=data,
    )


def join(pieces: Sequence[memoryview]) -> memoryview:
    """The pieces one after another, copied. Takes its time: call it in a thread."""
    import numpy as np

    # numpy copies without the GIL; bytes.join keeps it for anything but bytes.
    return np.concatenate([np.frombuffer(piece, dtype=np.uint8) for piece in pieces]).data


def check_size(dtype: str, shape: tuple[int, int], nbytes: int) -> None:
    """Raises `ProtocolError` unless `nbytes` bytes are exactly one `shape` = [tokens, dim] array of `dtype`."""
    if dtype not in ITEM_BYTES:
        raise ProtocolError(f"unknown dtype {dtype!r}")
    tokens, dim = shape
    if tokens < 0 or dim < 0 or tokens * dim * ITEM_BYTES[dtype] != nbytes:
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

    def rows_of_items(self) -> list[memoryview]:
        """The bytes of each item's rows, views of `data`. Raises `ProtocolError` when the items have other rows."""
        if sum(item.tokens for item in self.items) != self.shape[0]:
            raise ProtocolError(f"the items of {self.req_id!r} do not have {self.shape[0]} rows together")
        rows, row_bytes, start = [], self.shape[1] * ITEM_BYTES[self.dtype], 0
        for item in self.items:
            end = start + item.tokens * row_bytes
            rows.append(self.data[start:end])
            start = end
        return rows

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values as an array [tokens, dim].

        float32 and float16: a view of `data`. bfloat16, which numpy lacks: a float32 copy, exact, twice the size;
        `torch()` or `data` have it unconverted.
        """
        import numpy as np

        if self.dtype == "bfloat16":
            upper_half = np.frombuffer(self.data, dtype="<u2").astype("<u4")
            return (upper_half << 16).view("<f4").reshape(self.shape)
        return np.frombuffer(self.data, dtype=f"<f{ITEM_BYTES[self.dtype]}").reshape(self.shape)

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
