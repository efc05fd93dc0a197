"""What tiny checkpoints of every family are put together from: small text and vision settings, and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SPECIAL = [
    *("<pad>", "<unk>", "<s>", "</s>", "<image>", "<video>", "<audio>"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]", "<img>", "</img>", "<IMG_CONTEXT>"),
    *("<boi>", "<eoi>", "<boa>", "<eoa>"),
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
    "<|audio_unit|>",  # number 20
    *("<|image_start|>", "<|image_end|>", "<|img_thumbnail|>", "<|audio|>"),  # Voxtral's audio token is number 24
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|audio_pad|>"),
    *("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
    *("<|media_pad|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>"),
    *("<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
    *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>", "<im_end>", "<im_low>"),
    *("<frame_start>", "<frame_end>", "<|imgpad|>", "<|audio_comp_pad|>"),
    *("<slice>", "</slice>", "<image_id>", "</image_id>"),
]
ID = {token: number for number, token in enumerate(SPECIAL)}

PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]


def text(**more: Any) -> dict[str, Any]:
    """Settings of a small language model."""
    return {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
        "head_dim": 12,
        **more,
    }


def mrope(**more: Any) -> dict[str, Any]:
    """Settings of a small language model with three-dimensional positions."""
    return text(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}, **more)


def tower(**more: Any) -> dict[str, Any]:
    """Settings of a small vision transformer over tiles of 56 × 56."""
    return {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        **more,
    }


def grid_tower(**more: Any) -> dict[str, Any]:
    """Settings of a small vision transformer over images of any size."""
    return {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 96,
        "patch_size": 14,
        "out_hidden_size": 48,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **more,
    }


def experts(**more: Any) -> dict[str, Any]:
    """Settings of a small mixture of experts."""
    return {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **more}


def linear_attention() -> dict[str, Any]:
    """Settings of a small language model with linear attention (Qwen3.5)."""
    return {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }


def mel_tower() -> dict[str, Any]:
    """Settings of a small audio tower (Qwen3-ASR, Qwen3-Omni)."""
    return {
        "encoder_layers": 2,
        "num_hidden_layers": 2,
        "d_model": 64,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "output_dim": 48,
        "num_mel_bins": 32,
        "downsample_hidden_size": 16,
        "n_window": 50,
        "n_window_infer": 100,
    }


def bounds(factor: int, most: int) -> dict[str, int]:
    """Size limits of an image processor: one to `most` squares of `factor` pixels."""
    return {"shortest_edge": factor * factor, "longest_edge": factor * factor * most}


def tokenizer(**named: str) -> Any:
    """A tokenizer of `SPECIAL` and a few words. `named`: special tokens that processors ask it for by name."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, "a", "b", *map(str, range(10)), ":", ".", "video", "seconds"]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made.add_tokens([AddedToken("\n" * count, normalized=False) for count in range(1, 5)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named or None,
    )


def save(model: Any, processor: Any, directory: Path) -> None:
    """Write the checkpoint. Weights are scaled up, so that an error in any layer shows in the embedding."""
    for name, weight in model.named_parameters():
        if not weight.is_floating_point():
            continue
        if not weight.data.any():
            weight.data.normal_(std=0.1)  # biases, gates and separators: zeros would hide one that is cut wrongly
        elif weight.dim() > 1 and "embed" not in name:
            weight.data.mul_(4)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
