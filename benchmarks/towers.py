"""Checkpoints with towers of the shape of released ones and random weights: a forward takes the same time with any."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from encode_server.models.encoder import DTYPES
from encode_server.models.weights import quiet

WINDOW_PATCHES = 64  # 112 pixels of Qwen2.5-VL, in patches of 14


@dataclass(frozen=True)
class Tower:
    """The shape of a vision tower. `full`: layers that attend over the whole picture, None for all of them."""

    model_type: str
    depth: int
    hidden: int
    heads: int
    mlp: int
    gated: bool
    patch: int
    out: int
    full: tuple[int, ...] | None = None
    deepstack: tuple[int, ...] = field(default=())

    def patches(self, side: int) -> int:
        """Of a square picture whose side the processor rounds to whole merged patches."""
        return (round(side / (2 * self.patch)) * 2) ** 2

    def tflop(self, side: int) -> float:
        """Of the forward of one square picture: two for each multiplication, softmax and norms left out."""
        patches, width = self.patches(side), self.hidden
        layer = 4 * width * width + (3 if self.gated else 2) * width * self.mlp
        linear = patches * (self.depth * layer + 3 * 2 * self.patch**2 * width)
        mergers = 1 + len(self.deepstack)
        linear += patches // 4 * mergers * (4 * width * 4 * width + 4 * width * self.out)
        full = self.depth if self.full is None else len(self.full)
        keys = full * patches + (self.depth - full) * min(patches, WINDOW_PATCHES)
        return (2 * linear + 4 * patches * keys * width) / 1e12


FULL_SIZE = {
    "Qwen2.5-VL-7B": Tower("qwen2_5_vl", 32, 1280, 16, 3420, True, 14, 3584, full=(7, 15, 23, 31)),
    "Qwen3-VL-8B": Tower("qwen3_vl", 27, 1152, 16, 4304, False, 16, 4096, deepstack=(8, 16, 24)),
}
# The head widths of the large ones, 80 and 72, which is what attention kernels choose by.
SMALL = {
    "Qwen2.5-VL, small": Tower("qwen2_5_vl", 4, 640, 8, 640, True, 14, 256, full=(1, 3)),
    "Qwen3-VL, small": Tower("qwen3_vl", 4, 576, 8, 576, False, 16, 256, deepstack=(1, 2)),
}

# To try a script out where nothing is fast.
TINY = {
    "Qwen2.5-VL, tiny": Tower("qwen2_5_vl", 2, 64, 4, 64, True, 14, 64, full=(1,)),
    "Qwen3-VL, tiny": Tower("qwen3_vl", 2, 64, 4, 64, False, 16, 64, deepstack=(0,)),
}


def write_checkpoint(tower: Tower, directory: Path, *, dtype: str, device: str) -> Path:
    """A checkpoint of this tower, seeded, made on `device`, with a language model of next to nothing."""
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class, config = model_and_config(tower)
        with torch.device(device):
            model = model_class(config)
        model.to(DTYPES[dtype]).save_pretrained(directory)
    (directory / "processor_config.json").write_text(
        json.dumps(processors(tower), default=lambda value: value.tolist())
    )
    return directory


def model_and_config(tower: Tower) -> tuple[Any, Any]:
    """transformers' class and its configuration."""
    import transformers

    vision: dict[str, Any] = {
        "depth": tower.depth,
        "hidden_size": tower.hidden,
        "num_heads": tower.heads,
        "intermediate_size": tower.mlp,
        "patch_size": tower.patch,
        "out_hidden_size": tower.out,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    }
    tokens = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}
    if tower.model_type == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": list(tower.full or ()), "window_size": 112}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
        return transformers.Qwen2_5_VLForConditionalGeneration, config
    vision |= {"deepstack_visual_indexes": list(tower.deepstack)}
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Qwen3VLForConditionalGeneration, config


def processors(tower: Tower) -> dict[str, Any]:
    """Of images and of videos, as `processor_config.json` holds them."""
    import transformers

    size = {"shortest_edge": 56 * 56, "longest_edge": 2048 * 2048}  # nothing that is measured is made smaller
    images = transformers.Qwen2VLImageProcessor(patch_size=tower.patch, size=size)
    make = {"qwen2_5_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor"}[tower.model_type]
    videos = getattr(transformers, make)(patch_size=tower.patch)
    return {"image_processor": images.to_dict(), "video_processor": videos.to_dict()}
