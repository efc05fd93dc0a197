"""An item's rows as one vector. numpy only: the front imports no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from encode_server.wire.pools import Pool


def pooled(rows: memoryview, dtype: str, dim: int, pool: Pool) -> memoryview:
    """The mean (taken in float32) or the first of `rows`: [tokens, dim] values of `dtype`, as one row of `dtype`."""
    if pool is Pool.CLS:
        return memoryview(bytes(rows[: rows.nbytes * dim // _values(rows, dtype)]))
    mean = floats(rows, dtype).reshape(-1, dim).mean(axis=0, dtype=np.float32)
    return memoryview(_bytes(mean, dtype))


def floats(data: memoryview, dtype: str) -> npt.NDArray[np.float32]:
    """Values of `dtype` (`float32`, `float16`, `bfloat16`), little-endian, as float32: exact."""
    if dtype == "bfloat16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, "<f2" if dtype == "float16" else "<f4").astype(np.float32)


def _values(data: memoryview, dtype: str) -> int:
    return data.nbytes // (4 if dtype == "float32" else 2)


def _bytes(values: npt.NDArray[np.float32], dtype: str) -> bytes:
    """float32 as `dtype`, rounded to the nearest, ties to even."""
    if dtype != "bfloat16":
        return values.astype("<f2" if dtype == "float16" else "<f4").tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
