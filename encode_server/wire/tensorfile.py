"""The head of a safetensors file with one tensor: what comes before its bytes.

Format: https://github.com/huggingface/safetensors#format. Written here, not by the library, because it has no bfloat16
without torch, and would copy the tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import msgspec

from encode_server.wire.dtypes import TO_SAFETENSORS


def tensor_head(name: str, dtype: str, shape: tuple[int, int], nbytes: int, metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON header of a file whose `nbytes` bytes of tensor `name` follow directly."""
    tensor = {"dtype": TO_SAFETENSORS[dtype], "shape": shape, "data_offsets": (0, nbytes)}
    header = msgspec.json.encode({"__metadata__": dict(metadata), name: tensor})
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def expected_size(start: bytes) -> int | None:
    """Bytes of a whole file, from its first ones; None when they are not the start of such a file."""
    length = int.from_bytes(start[:8], "little")
    try:
        header = json.loads(start[8 : 8 + length])
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return 8 + length + int(max(ends))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        return None


def head_metadata(start: bytes) -> dict[str, str]:
    """The metadata of a file, from its first bytes; empty when they are not the start of such a file."""
    length = int.from_bytes(start[:8], "little")
    try:
        found = json.loads(start[8 : 8 + length]).get("__metadata__", {})
        return {key: value for key, value in found.items() if isinstance(value, str)}
    except (ValueError, AttributeError, RecursionError):
        return {}
