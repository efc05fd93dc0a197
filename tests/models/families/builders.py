"""Tiny checkpoints of every family, from transformers' real classes: model of random weights, processor, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr

from tests.models.families.parts import (
    ID,
    PINPOINTS,
    bounds,
    experts,
    grid_tower,
    linear_attention,
    mel_tower,
    mrope,
    save,
    text,
    tokenizer,
    tower,
)

Made = tuple[Any, Any]
"""A model and its processor."""


def write(family: str, directory: Path) -> Path:
    """Write the checkpoint of `family`, one of `BUILDERS`, unless it is there.

    Skips the test where an older release of transformers has no such family.
    """
    if not (directory / "config.json").exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                made = BUILDERS[family]()
            except AttributeError as error:
                if "module transformers has no attribute" not in str(error):
                    raise
                pytest.skip(f"transformers {tr.__version__}: {error}")
            save(*made, directory)
    return directory


def llava() -> Made:
    config = tr.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **tower()},
        text_config={"model_type": "llama", **text()},
        image_token_index=ID["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    processor = tr.LlavaProcessor(
        tr.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return tr.LlavaForConditionalGeneration(config), processor


def llava_pixtral() -> Made:
    config = tr.LlavaConfig(
        vision_config={"model_type": "pixtral", **tower(image_size=168, head_dim=16)},
        text_config={"model_type": "mistral", **text()},
        image_token_index=ID["[IMG]"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = tr.PixtralProcessor(
        tr.PixtralImageProcessor(size={"longest_edge": 168}, patch_size=14), tokenizer(), patch_size=14
    )
    return tr.LlavaForConditionalGeneration(config), processor


def llava_next() -> Made:
    config = tr.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **tower()},
        text_config={"model_type": "llama", **text()},
        image_token_index=ID["<image>"],
        vision_feature_layer=-2,
        image_grid_pinpoints=PINPOINTS,
    )
    processor = tr.LlavaNextProcessor(
        tr.LlavaNextImageProcessor(
            size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return tr.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> Made:
    config = tr.LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **tower(), "vision_use_head": False},
        text_config={"model_type": "qwen2", **text()},
        image_token_index=ID["<image>"],
        video_token_index=ID["<video>"],
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_9",
    )
    processor = tr.LlavaOnevisionProcessor(
        tr.LlavaOnevisionImageProcessor(size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS),
        tokenizer(),
        tr.LlavaOnevisionVideoProcessor(size={"height": 56, "width": 56}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )
    return tr.LlavaOnevisionForConditionalGeneration(config), processor


def gemma3() -> Made:
    config = tr.Gemma3Config(
        vision_config={**tower(image_size=112), "vision_use_head": False},
        text_config={"model_type": "gemma3_text", **text()},
        mm_tokens_per_image=16,
        image_token_index=ID["<image>"],
        boi_token_index=ID["<boi>"],
        eoi_token_index=ID["<eoi>"],
    )
    processor = tr.Gemma3Processor(
        tr.Gemma3ImageProcessor(size={"height": 112, "width": 112}),
        tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>"),
        image_seq_length=16,
    )
    return tr.Gemma3ForConditionalGeneration(config), processor


def idefics3() -> Made:
    config = tr.Idefics3Config(
        vision_config=tower(),
        text_config={"model_type": "llama", **text()},
        image_token_id=ID["<image>"],
        scale_factor=2,
    )
    processor = tr.Idefics3Processor(
        tr.Idefics3ImageProcessor(size={"longest_edge": 168}, max_image_size={"longest_edge": 56}),
        tokenizer(),
        image_seq_len=4,
    )
    return tr.Idefics3ForConditionalGeneration(config), processor


def smolvlm() -> Made:
    config = tr.SmolVLMConfig(
        vision_config=tower(),
        text_config={"model_type": "llama", **text()},
        image_token_id=ID["<image>"],
        scale_factor=2,
    )
    processor = tr.SmolVLMProcessor(
        tr.SmolVLMImageProcessor(size={"longest_edge": 168}, max_image_size={"longest_edge": 56}),
        tokenizer(),
        tr.SmolVLMVideoProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 56}),
        image_seq_len=4,
    )
    return tr.SmolVLMForConditionalGeneration(config), processor


def internvl() -> Made:
    config = tr.InternVLConfig(
        vision_config=tower(image_size=[56, 56], patch_size=[14, 14], norm_type="layer_norm"),
        text_config={"model_type": "qwen2", **text()},
        image_token_id=ID["<IMG_CONTEXT>"],
        image_seq_length=4,
    )
    processor = tr.InternVLProcessor(
        tr.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=6),
        tokenizer(
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        tr.InternVLVideoProcessor(size={"height": 56, "width": 56}),
        image_seq_length=4,
    )
    return tr.InternVLForConditionalGeneration(config), processor


def mistral3() -> Made:
    config = tr.Mistral3Config(
        vision_config={"model_type": "pixtral", **tower(image_size=168, head_dim=16)},
        text_config={"model_type": "mistral", **text()},
        image_token_index=ID["[IMG]"],
        spatial_merge_size=2,
    )
    processor = tr.PixtralProcessor(
        tr.PixtralImageProcessor(size={"longest_edge": 168}, patch_size=14),
        tokenizer(),
        patch_size=14,
        spatial_merge_size=2,
    )
    return tr.Mistral3ForConditionalGeneration(config), processor


def lfm2_vl() -> Made:
    vision = {"model_type": "siglip2_vision_model", **tower(patch_size=16, num_patches=64), "vision_use_head": False}
    vision.pop("image_size")
    language = {
        "model_type": "lfm2",
        **text(layer_types=["conv", "full_attention"]),
    }
    for name in ("head_dim", "max_position_embeddings"):
        language.pop(name)
    config = tr.Lfm2VlConfig(
        vision_config=vision, text_config=language, image_token_id=ID["<image>"], downsample_factor=2
    )
    processor = tr.Lfm2VlProcessor(
        tr.Lfm2VlImageProcessor(
            encoder_patch_size=16,
            tile_size=128,
            min_image_tokens=4,
            max_image_tokens=16,
            max_num_patches=64,
            min_tiles=2,
            max_tiles=4,
            use_thumbnail=True,
        ),
        tokenizer(),
    )
    return tr.Lfm2VlForConditionalGeneration(config), processor


def gemma4() -> Made:
    config = tr.Gemma4Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "patch_size": 16,
            "pooling_kernel_size": 3,
            "position_embedding_size": 64,
        },
        text_config={
            "model_type": "gemma4_text",
            **text(
                layer_types=["sliding_attention", "full_attention"],
                vocab_size_per_layer_input=512,
                hidden_size_per_layer_input=0,
                num_kv_shared_layers=0,
            ),
        },
        audio_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "output_proj_dims": 64,
            "subsampling_conv_channels": [128, 8],
        },
        image_token_id=ID["<image>"],
        boi_token_id=ID["<boi>"],
        eoi_token_id=ID["<eoi>"],
        audio_token_id=ID["<audio>"],
        boa_token_id=ID["<boa>"],
        eoa_token_index=ID["<eoa>"],
        video_token_id=ID["<|video|>"],
    )
    processor = tr.Gemma4Processor(
        tr.Gemma4AudioFeatureExtractor(),
        tr.Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer(
            image_token="<image>",
            boi_token="<boi>",
            eoi_token="<eoi>",
            audio_token="<audio>",
            boa_token="<boa>",
            eoa_token="<eoa>",
        ),
        tr.Gemma4VideoProcessor(num_frames=4),
        image_seq_length=70,
    )
    return tr.Gemma4ForConditionalGeneration(config), processor


def paligemma() -> Made:
    config = tr.PaliGemmaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            **tower(),
            "vision_use_head": False,
            "projection_dim": 48,
        },
        text_config={"model_type": "gemma", **text()},
        image_token_index=ID["<image>"],
        projection_dim=48,
    )
    images = tr.SiglipImageProcessor(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    processor = tr.PaliGemmaProcessor(images, tokenizer(image_token="<image>"))
    return tr.PaliGemmaForConditionalGeneration(config), processor


def cohere2_vision() -> Made:
    config = tr.Cohere2VisionConfig(
        vision_config={"model_type": "siglip_vision_model", **tower(), "vision_use_head": False},
        text_config={"model_type": "cohere2", **text(eos_token_id=3, bos_token_id=2)},
        downsample_factor=2,
        image_token_id=ID["<image>"],
        alignment_intermediate_size=128,
    )
    processor = tr.Cohere2VisionProcessor(
        tr.Cohere2VisionImageProcessor(size={"height": 56, "width": 56}, max_patches=4, patch_size=2),
        tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>", img_line_break_token="[IMG_BREAK]"),
    )
    return tr.Cohere2VisionForConditionalGeneration(config), processor


def qwen3_asr() -> Made:
    config = tr.Qwen3ASRConfig(
        audio_config=mel_tower(),
        text_config={"model_type": "qwen3", **text()},
        audio_token_id=ID["<audio>"],
    )
    processor = tr.Qwen3ASRProcessor(
        tr.Qwen3ASRFeatureExtractor(feature_size=32),
        tokenizer(audio_token="<audio>", audio_bos_token="<boa>", audio_eos_token="<eoa>"),
    )
    return tr.Qwen3ASRForConditionalGeneration(config), processor


def voxtral() -> Made:
    config = tr.VoxtralConfig(
        audio_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_mel_bins": 32,
            "max_source_positions": 200,
        },
        text_config={"model_type": "llama", **text()},
        audio_token_id=24,
    )
    extractor = tr.WhisperFeatureExtractor(feature_size=32, chunk_length=4)
    return tr.VoxtralForConditionalGeneration(config), tr.VoxtralProcessor(extractor, tokenizer())


def _glm_processor(cls: str, images: str, videos: str, **more: Any) -> Any:
    size = bounds(28, 16)
    return getattr(tr, cls)(
        getattr(tr, images)(patch_size=14, size=size, **more),
        tokenizer(),
        getattr(tr, videos)(patch_size=14, size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}, **more),
    )


_GLM = {
    "image_token_id": ID["<|image|>"],
    "video_token_id": ID["<|video|>"],
    "image_start_token_id": ID["<|begin_of_image|>"],
    "image_end_token_id": ID["<|end_of_image|>"],
    "video_start_token_id": ID["<|begin_of_video|>"],
    "video_end_token_id": ID["<|end_of_video|>"],
}


def glm4v() -> Made:
    config = tr.Glm4vConfig(
        vision_config=grid_tower(image_size=56), text_config=mrope(partial_rotary_factor=1.0), **_GLM
    )
    return tr.Glm4vForConditionalGeneration(config), _glm_processor(
        "Glm4vProcessor", "Glm4vImageProcessor", "Glm4vVideoProcessor"
    )


def glm4v_moe() -> Made:
    config = tr.Glm4vMoeConfig(
        vision_config=grid_tower(image_size=56),
        text_config=mrope(partial_rotary_factor=1.0, first_k_dense_replace=1, **experts(n_group=1, topk_group=1)),
        **_GLM,
    )
    return tr.Glm4vMoeForConditionalGeneration(config), _glm_processor(
        "Glm4vProcessor", "Glm4vImageProcessor", "Glm4vVideoProcessor"
    )


def glm46v() -> Made:
    config = tr.Glm46VConfig(
        vision_config=grid_tower(image_size=56, model_type="glm4v_vision"),
        text_config=mrope(partial_rotary_factor=1.0, model_type="glm4v_text"),
        **_GLM,
    )
    return tr.Glm46VForConditionalGeneration(config), _glm_processor(
        "Glm46VProcessor", "Glm46VImageProcessor", "Glm46VVideoProcessor"
    )


def glm5_next() -> Made:
    vision = grid_tower(image_size=56, projection_intermediate_size=80)
    language = {
        **text(num_key_value_heads=4),
        **experts(),
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "pad_token_id": 0,
        "num_hidden_layers": 4,
    }
    language.pop("head_dim")
    config = tr.Glm5NextConfig(vision_config=vision, text_config=language, **_GLM)
    return tr.Glm5NextForConditionalGeneration(config), _glm_processor(
        "Glm5NextProcessor", "Glm5NextImageProcessor", "Glm5NextVideoProcessor"
    )


def kimi_k25() -> Made:
    config = tr.Kimi_K25Config(
        vision_config={
            "num_hidden_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "projection_hidden_size": 64,
        },
        projection_hidden_size=64,
        text_config={
            "model_type": "deepseek_v3",
            **text(num_key_value_heads=4),
            **experts(n_group=1, topk_group=1),
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        image_token_id=ID["<|media_pad|>"],
        video_token_id=ID["<|kimi_k25_video_placeholder|>"],
    )
    processor = tr.Kimi_K25Processor(tr.Kimi_K25ImageProcessor(), tokenizer(), tr.Kimi_K25VideoProcessor())
    return tr.Kimi_K25ForConditionalGeneration(config), processor


def paddleocr_vl() -> Made:
    config = tr.PaddleOCRVLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
        },
        text_config=mrope(model_type="paddleocr_vl_text"),
        image_token_id=ID["<image>"],
        video_token_id=ID["<video>"],
    )
    processor = tr.PaddleOCRVLProcessor(
        tr.PaddleOCRVLImageProcessor(size=bounds(28, 16)), tokenizer(image_token="<image>")
    )
    return tr.PaddleOCRVLForConditionalGeneration(config), processor


def ernie4_5_vl_moe() -> Made:
    config = tr.Ernie4_5_VLMoeConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "intermediate_size": 96,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
        text_config=mrope(moe_intermediate_size=[16, 16], moe_num_experts=4, moe_k=2),
        image_token_id=ID["<image>"],
        video_token_id=ID["<video>"],
        image_start_token_id=ID["<|image_start|>"],
        image_end_token_id=ID["<|image_end|>"],
        video_start_token_id=ID["<|begin_of_video|>"],
        video_end_token_id=ID["<|end_of_video|>"],
    )
    processor = tr.Ernie4_5_VLMoeProcessor(
        tr.Ernie4_5_VLMoeImageProcessor(size=bounds(28, 16)),
        tokenizer(
            image_token="<image>",
            image_start_token="<|image_start|>",
            image_end_token="<|image_end|>",
            video_token="<video>",
            video_start_token="<|begin_of_video|>",
            video_end_token="<|end_of_video|>",
        ),
        tr.Ernie4_5_VLMoeVideoProcessor(size=bounds(28, 16), draw_on_frames=False),
    )
    return tr.Ernie4_5_VLMoeForConditionalGeneration(config), processor


_QWEN_IDS = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
}


_HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
"""What Qwen3 normalises images by, as its class of videos does by itself."""


def _qwen_processor(cls: str, patch: int, videos: str = "Qwen2VLVideoProcessor") -> Any:
    factor = 2 * patch
    return getattr(tr, cls)(
        tr.Qwen2VLImageProcessor(patch_size=patch, size=bounds(factor, 32), **(_HALVES if patch == 16 else {})),
        tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>"),
        getattr(tr, videos)(patch_size=patch, size=bounds(factor, 64)),
    )


def qwen2_vl() -> Made:
    vision = {"depth": 3, "embed_dim": 64, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2}
    config = tr.Qwen2VLConfig(text_config=mrope(), vision_config=vision, **_QWEN_IDS)
    return tr.Qwen2VLForConditionalGeneration(config), _qwen_processor("Qwen2VLProcessor", 14)


def qwen2_5_vl() -> Made:
    vision = grid_tower(depth=3, fullatt_block_indexes=[1])
    config = tr.Qwen2_5_VLConfig(text_config=mrope(), vision_config=vision, **_QWEN_IDS)
    return tr.Qwen2_5_VLForConditionalGeneration(config), _qwen_processor("Qwen2_5_VLProcessor", 14)


def _qwen3_tower(**more: Any) -> dict[str, Any]:
    return grid_tower(patch_size=16, num_position_embeddings=64, **more)


def qwen3_vl() -> Made:
    vision = _qwen3_tower(depth=3, deepstack_visual_indexes=[0, 1])
    config = tr.Qwen3VLConfig(text_config=mrope(), vision_config=vision, **_QWEN_IDS)
    processor = _qwen_processor("Qwen3VLProcessor", 16, "Qwen3VLVideoProcessor")
    return tr.Qwen3VLForConditionalGeneration(config), processor


def qwen3_vl_moe() -> Made:
    vision = _qwen3_tower(depth=3, deepstack_visual_indexes=[0, 1])
    language = mrope(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16)
    config = tr.Qwen3VLMoeConfig(text_config=language, vision_config=vision, **_QWEN_IDS)
    processor = _qwen_processor("Qwen3VLProcessor", 16, "Qwen3VLVideoProcessor")
    return tr.Qwen3VLMoeForConditionalGeneration(config), processor


def qwen3_5() -> Made:
    language = mrope(**linear_attention())
    language["rope_parameters"]["partial_rotary_factor"] = 1.0
    config = tr.Qwen3_5Config(vision_config=_qwen3_tower(), text_config=language, **_QWEN_IDS)
    processor = _qwen_processor("Qwen3VLProcessor", 16, "Qwen3VLVideoProcessor")
    return tr.Qwen3_5ForConditionalGeneration(config), processor


def qwen3_5_moe() -> Made:
    language = mrope(
        **linear_attention(),
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    language["rope_parameters"]["partial_rotary_factor"] = 1.0
    config = tr.Qwen3_5MoeConfig(vision_config=_qwen3_tower(), text_config=language, **_QWEN_IDS)
    processor = _qwen_processor("Qwen3VLProcessor", 16, "Qwen3VLVideoProcessor")
    return tr.Qwen3_5MoeForConditionalGeneration(config), processor


_OMNI_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<boa>",
    "audio_eos_token": "<eoa>",
}
_OMNI_IDS = {
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "audio_token_id": ID["<|audio_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
    "audio_start_token_id": ID["<boa>"],
    "audio_end_token_id": ID["<eoa>"],
}


def qwen3_omni_moe_thinker() -> Made:
    config = tr.Qwen3OmniMoeThinkerConfig(
        vision_config=_qwen3_tower(deepstack_visual_indexes=[0]),
        audio_config=mel_tower(),
        text_config=mrope(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16),
        **_OMNI_IDS,
    )
    processor = tr.Qwen3OmniMoeProcessor(
        tr.Qwen2VLImageProcessor(patch_size=16, size=bounds(32, 32), **_HALVES),
        tr.Qwen2VLVideoProcessor(patch_size=16, size=bounds(32, 64)),
        tr.WhisperFeatureExtractor(feature_size=32, chunk_length=10),
        tokenizer(**_OMNI_TOKENS),
    )
    return tr.Qwen3OmniMoeThinkerForConditionalGeneration(config), processor


def qwen2_5_omni_thinker() -> Made:
    config = tr.Qwen2_5OmniThinkerConfig(
        vision_config=grid_tower(depth=3, fullatt_block_indexes=[1]),
        audio_config={
            "encoder_layers": 2,
            "d_model": 64,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "output_dim": 48,
            "num_mel_bins": 32,
            "n_window": 20,
        },
        text_config=mrope(),
        image_token_index=ID["<|image_pad|>"],
        video_token_index=ID["<|video_pad|>"],
        audio_token_index=ID["<|audio_pad|>"],
        vision_start_token_id=ID["<|vision_start|>"],
        vision_end_token_id=ID["<|vision_end|>"],
        audio_start_token_id=ID["<boa>"],
        audio_end_token_id=ID["<eoa>"],
    )
    processor = tr.Qwen2_5OmniProcessor(
        tr.Qwen2VLImageProcessor(patch_size=14, size=bounds(28, 32)),
        tr.Qwen2VLVideoProcessor(patch_size=14, size=bounds(28, 64)),
        tr.WhisperFeatureExtractor(feature_size=32, chunk_length=10),
        tokenizer(**_OMNI_TOKENS),
    )
    return tr.Qwen2_5OmniThinkerForConditionalGeneration(config), processor


def llama4() -> Made:
    config = tr.Llama4Config(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "pixel_shuffle_ratio": 0.5,
        },
        text_config=text(intermediate_size_mlp=64, num_local_experts=2),
        image_token_index=ID["<|patch|>"],
        boi_token_index=ID["<|image_start|>"],
        eoi_token_index=ID["<|image_end|>"],
    )
    processor = tr.Llama4Processor(
        tr.Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4), tokenizer(), patch_size=14
    )
    return tr.Llama4ForConditionalGeneration(config), processor


def minicpmv4_6() -> Made:
    config = tr.MiniCPMV4_6Config(
        vision_config=tower(image_size=112),
        text_config={"model_type": "qwen3_5_text", **text(**linear_attention())},
        insert_layer_id=1,
        image_token_id=ID["<image>"],
        video_token_id=ID["<video>"],
    )
    processor = tr.MiniCPMV4_6Processor(
        tr.MiniCPMV4_6ImageProcessor(scale_resolution=112, max_slice_nums=4),
        tr.MiniCPMV4_6VideoProcessor(scale_resolution=112),
        tokenizer(
            image_token="<image>",
            video_token="<video>",
            image_start_token="<img>",
            image_end_token="</img>",
            slice_start_token="<slice>",
            slice_end_token="</slice>",
            image_id_start_token="<image_id>",
            image_id_end_token="</image_id>",
        ),
    )
    return tr.MiniCPMV4_6ForConditionalGeneration(config), processor


def molmo2() -> Made:
    config = tr.Molmo2Config(
        vision_config=tower(image_size=[378, 378], head_dim=16, num_key_value_heads=4),
        adapter_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "vision_feature_layer": [-1, -2],
            "text_hidden_size": 48,
        },
        text_config=text(),
        image_patch_id=ID["<im_patch>"],
        image_token_id=ID["<im_patch>"],
        image_start_token_id=ID["<im_start>"],
        low_res_image_start_token_id=ID["<low_res_im_start>"],
        image_end_token_id=ID["<im_end>"],
        image_low_res_id=ID["<im_low>"],
        image_col_id=ID["<im_col>"],
        frame_start_token_id=ID["<frame_start>"],
        frame_end_token_id=ID["<frame_end>"],
    )
    processor = tr.Molmo2Processor(tr.Molmo2ImageProcessor(max_crops=4), tr.Molmo2VideoProcessor(), tokenizer())
    return tr.Molmo2ForConditionalGeneration(config), processor


def deepseek_ocr2() -> Made:
    sam = {
        "hidden_size": 64,
        "output_channels": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 768,
        "patch_size": 16,
        "mlp_dim": 96,
        "window_size": 14,
        "global_attn_indexes": [1],
        "downsample_channels": [32, 48],
    }
    encoder = text(vocab_size=1)
    encoder.pop("max_position_embeddings")
    config = tr.DeepseekOcr2Config(
        vision_config={"sam_config": sam, "encoder_config": encoder},
        text_config=text(mlp_layer_types=["dense", "dense"], num_key_value_heads=4) | experts(),
        image_token_id=ID["<image>"],
    )
    processor = tr.DeepseekOcr2Processor(
        tr.DeepseekOcr2ImageProcessor(size={"height": 768, "width": 768}, tile_size=768), tokenizer()
    )
    return tr.DeepseekOcr2ForConditionalGeneration(config), processor


def dots3_note() -> Made:
    language = {
        **text(num_key_value_heads=4),
        **experts(shared_experts_intermediate_size=16),
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "index_head_dim": 8,
        "index_n_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        "use_sliding_window": False,
    }
    config = tr.Dots3NoteConfig(
        text_config=language,
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "adapter_in_dim": 64,
            "adapter_out_dim": 48,
            "moe_intermediate_size": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_layer_types": ["dense", "sparse"],
        },
        audio_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "downsample_hidden_size": 16,
            "adapter_input_size": 64,
            "adapter_out_dim": 48,
        },
        image_token_id=ID["<|imgpad|>"],
        video_token_id=ID["<|video_pad|>"],
        audio_token_id=ID["<|audio_comp_pad|>"],
    )
    processor = tr.Dots3NoteProcessor(
        tr.Qwen2VLImageProcessor(patch_size=14, temporal_patch_size=1, size=bounds(28, 16)),
        tokenizer(),
        tr.Qwen2VLVideoProcessor(patch_size=14, temporal_patch_size=1, size=bounds(28, 64)),
        tr.Dots3NoteFeatureExtractor(),
    )
    return tr.Dots3NoteForConditionalGeneration(config), processor


def janus() -> Made:
    config = tr.JanusConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "mlp_ratio": 2.0,
            "image_size": 56,
            "patch_size": 14,
            "num_image_tokens": 16,
            "projection_dim": 48,
        },
        vq_config={
            "base_channels": 32,
            "channel_multiplier": [1, 2],
            "num_res_blocks": 1,
            "latent_channels": 32,
            "num_embeddings": 64,
            "image_token_embed_dim": 48,
            "projection_dim": 48,
            "num_patches": 4,
        },
        text_config={"model_type": "llama", **text()},
        image_token_id=ID["<image>"],
    )
    processor = tr.JanusProcessor(
        tr.JanusImageProcessor(size={"height": 56, "width": 56}, min_size=14),
        tokenizer(image_token="<image>", boi_token="<boi>", eoi_token="<eoi>"),
        num_image_tokens=16,
    )
    return tr.JanusForConditionalGeneration(config), processor


BUILDERS: Mapping[str, Callable[[], Made]] = {
    builder.__name__: builder
    for builder in (
        *(qwen2_vl, qwen2_5_vl, qwen3_vl, qwen3_vl_moe, qwen3_5, qwen3_5_moe),
        *(qwen2_5_omni_thinker, qwen3_omni_moe_thinker, qwen3_asr, voxtral),
        *(glm4v, glm4v_moe, glm46v, glm5_next, kimi_k25, dots3_note, ernie4_5_vl_moe, paddleocr_vl),
        *(llava, llava_pixtral, llava_next, llava_onevision, mistral3, internvl, gemma3, gemma4, paligemma),
        *(llama4, minicpmv4_6, molmo2, deepseek_ocr2, idefics3, smolvlm, lfm2_vl, cohere2_vision, janus),
    )
}
