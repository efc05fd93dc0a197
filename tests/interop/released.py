"""Tiny checkpoints as the released ones of their families are: names of tensors and settings that engines rely on.

transformers renamed parts of its towers, and reads both layouts; engines read the layout that was released.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.models.families.builders import write

_TOWER = re.compile(r"(vision_tower\.)(?=(?:embeddings|encoder|post_layernorm|pre_layrnorm)\.)")

SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "gemma4": {"vision_config": {"default_output_length": 70}},
    "glm4v_moe": {"text_config": {"use_qk_norm": False}},
    "lfm2_vl": {
        "text_config": {
            **{"conv_dim": 48, "conv_dim_out": 48, "block_dim": 48, "block_ff_dim": 64},
            **{"block_multiple_of": 1, "block_auto_adjust_ff_dim": False, "block_ffn_dim_multiplier": 1.0},
        }
    },
    "qwen2_vl": {"vision_config": {"in_chans": 3}},
    "qwen3_5": {"vision_config": {"deepstack_visual_indexes": []}},
    "qwen3_5_moe": {"vision_config": {"deepstack_visual_indexes": []}},
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
}
"""Settings that the released checkpoints of a family have and transformers' configuration class does not."""


def write_released(family: str, directory: Path) -> Path:
    """Write the checkpoint of `family`, one of the builders, in the layout of the released ones."""
    write(family, directory)
    config = json.loads((directory / "config.json").read_text())
    for part, more in SETTINGS.get(family, {}).items():
        (config[part] if part else config).update(more)
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    if config.get("vision_config", {}).get("model_type") in ("siglip_vision_model", "clip_vision_model"):
        tensors = {_TOWER.sub(r"\1vision_model.", name): tensor for name, tensor in tensors.items()}
    if family == "lfm2_vl":
        tensors = {re.sub(r"(vision_tower\.)", r"\1vision_model.", name): tensor for name, tensor in tensors.items()}
    if family.endswith("_thinker"):  # released as part of a model that also speaks
        tensors = {f"thinker.{name}": tensor for name, tensor in tensors.items()}
        architecture = config["architectures"][0].replace("Thinker", "")
        model_type = family.removesuffix("_thinker")
        config = {"model_type": model_type, "architectures": [architecture], "thinker_config": config}
    save_file(tensors, file, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory
