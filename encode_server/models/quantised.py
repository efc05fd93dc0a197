"""A quantised language model is no obstacle, a quantised encoder is refused. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from encode_server.errors import StartupError
from encode_server.models.checkpoint import Checkpoint, stored_tensors, weight_files

_SETTING = "quantization_config"
_PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})
_PLAIN_NAMES = frozenset({"position_ids"})
"""Buffers of indices, which old releases of transformers saved."""
_QUANTISED_NAMES = frozenset(
    {
        *("qweight", "qzeros", "scales", "g_idx"),  # AWQ, GPTQ
        *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_shape"),  # compressed, FP8
        *("SCB", "absmax", "quant_map"),  # bitsandbytes
    }
)


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without its `quantization_config`, nor those of its parts.

    transformers would otherwise load the quantiser's package, for weights of the language model that are never read.
    """
    return {
        key: unquantised(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != _SETTING
    }


def check_unquantised(checkpoint: Checkpoint) -> None:
    """Check that the encoder's weights are stored as plain numbers. Reads the headers of the shards only.

    Raises:
        StartupError: an encoder tensor is quantised (the message names the first), or a shard is unreadable.
    """
    files = weight_files(checkpoint)
    stored = {key: tensor.dtype for file in files for key, tensor in stored_tensors(file).items()}
    # A packed weight has another name than the weight that it stands for.
    plain = {key: _plain_name(key) for key in stored}
    wanted = checkpoint.encoder_keys({*plain.values()})
    for key, dtype in stored.items():
        if plain[key] in wanted and _is_quantised(key, dtype):
            raise StartupError(
                f"model {checkpoint.name!r}: its encoder is quantised ({key} is {dtype}); "
                "only the language model of a checkpoint may be"
            )


def _plain_name(key: str) -> str:
    path, _, name = key.rpartition(".")
    return f"{path}.weight" if name in _QUANTISED_NAMES else key


def _is_quantised(key: str, dtype: str) -> bool:
    name = key.rpartition(".")[2]
    return name in _QUANTISED_NAMES or (dtype not in _PLAIN_DTYPES and name not in _PLAIN_NAMES)
