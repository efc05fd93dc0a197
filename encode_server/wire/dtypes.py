"""The dtypes an embedding may have, by torch's names, which our messages and answers use."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "float16": 2, "bfloat16": 2})
"""Bytes per element."""

TO_SAFETENSORS: Mapping[str, str] = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})
"""safetensors' name of each."""

FROM_SAFETENSORS: Mapping[str, str] = MappingProxyType({name: dtype for dtype, name in TO_SAFETENSORS.items()})
"""The other way round."""
