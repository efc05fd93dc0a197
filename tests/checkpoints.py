"""Tiny checkpoints with seeded random weights, made from transformers' real classes, each with its own processors.

    checkpoints = Checkpoints(tmp_path_factory.mktemp("checkpoints"))
    checkpoints.path("qwen2_5_vl")     # written on the first call

Weights are scaled up from transformers' initial ones, so that an error in any layer shows in the embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

HEADS = 4
WIDTH = 64
TEXT_WIDTH = 48


class Checkpoints:
    """Writes each checkpoint once, below one directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, name: str) -> Path:
        """Directory of the checkpoint called `name`, one of `BUILDERS`."""
        directory = self._root / name
        if not directory.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                BUILDERS[name](directory)
        return directory


def _text(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        **more,
    }


_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}}


def _save(model: Any, directory: Path, processors: Mapping[str, Any]) -> None:
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            weight.data.mul_(4)
        elif name.endswith("bias"):
            # zero biases would hide one added twice, or cut wrongly
            weight.data.normal_(std=0.1)
    model.save_pretrained(directory)
    nested = {key: processor.to_dict() for key, processor in processors.items()}
    (directory / "processor_config.json").write_text(json.dumps(nested, default=lambda value: value.tolist()))


def _qwen_processors(patch_size: int = 14, **video: Any) -> dict[str, Any]:
    from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    small = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 256}
    return {
        "image_processor": Qwen2VLImageProcessor(patch_size=patch_size, size=small),
        "video_processor": Qwen2VLVideoProcessor(
            patch_size=patch_size, size=small, cap_pixels_per_frame=False, **video
        ),
    }


def _extractor(mel: int, **more: Any) -> dict[str, Any]:
    from transformers import WhisperFeatureExtractor

    return {"feature_extractor": WhisperFeatureExtractor(feature_size=mel, return_attention_mask=True, **more)}


def _qwen2_vl(directory: Path) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 3, "embed_dim": WIDTH, "hidden_size": TEXT_WIDTH, "num_heads": HEADS, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=_text(**_MROPE), vision_config=vision)
    _save(Qwen2VLForConditionalGeneration(config), directory, _qwen_processors())


def _qwen2_5_vision() -> dict[str, Any]:
    return {
        "depth": 3,
        "hidden_size": WIDTH,
        "num_heads": HEADS,
        "intermediate_size": 90,  # as with 3420, not every tp divides it
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [1],
    }


def _qwen2_5_vl(directory: Path) -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(text_config=_text(**_MROPE), vision_config=_qwen2_5_vision())
    _save(Qwen2_5_VLForConditionalGeneration(config), directory, _qwen_processors())


def _wide(directory: Path) -> None:
    """Qwen2.5-VL with weights large enough that a CPU packs them."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = _qwen2_5_vision() | {"hidden_size": 256, "intermediate_size": 512}
    config = Qwen2_5_VLConfig(text_config=_text(**_MROPE), vision_config=vision)
    _save(Qwen2_5_VLForConditionalGeneration(config), directory, _qwen_processors())


def _qwen3_vl(directory: Path) -> None:
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLVideoProcessor,
    )

    vision = {
        "depth": 3,
        "hidden_size": WIDTH,
        "num_heads": HEADS,
        "intermediate_size": 96,
        "out_hidden_size": TEXT_WIDTH,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = Qwen3VLConfig(text_config=_text(head_dim=12, **_MROPE), vision_config=vision)
    processors = {
        "image_processor": Qwen2VLImageProcessor(
            patch_size=16,
            size={"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 256},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        "video_processor": Qwen3VLVideoProcessor(
            size={"shortest_edge": 64 * 64, "longest_edge": 32 * 32 * 512}, cap_pixels_per_frame=False
        ),
    }
    _save(Qwen3VLForConditionalGeneration(config), directory, processors)


def _thinker_config() -> Any:
    from transformers import Qwen2_5OmniThinkerConfig

    audio = {
        "encoder_layers": 2,
        "d_model": WIDTH,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": 90,
        "output_dim": TEXT_WIDTH,
        "num_mel_bins": 32,
        "n_window": 20,
    }
    return Qwen2_5OmniThinkerConfig(text_config=_text(**_MROPE), vision_config=_qwen2_5_vision(), audio_config=audio)


def _thinker(directory: Path) -> None:
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    from tests.models.families.parts import tokenizer

    processors = _qwen_processors(do_sample_frames=True, fps=2) | _extractor(32, chunk_length=10)
    _save(Qwen2_5OmniThinkerForConditionalGeneration(_thinker_config()), directory, processors)
    tokenizer(
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        audio_token="<|audio_pad|>",
        vision_bos_token="<|vision_start|>",
        vision_eos_token="<|vision_end|>",
        audio_bos_token="<boa>",
        audio_eos_token="<eoa>",
    ).save_pretrained(directory)
    config = json.loads((directory / "processor_config.json").read_text())
    config["processor_class"] = "Qwen2_5OmniProcessor"
    (directory / "processor_config.json").write_text(json.dumps(config))


def _omni(directory: Path) -> None:
    """The thinker inside a whole Qwen2.5-Omni checkpoint, beside a talker that must not be read."""
    from safetensors.torch import load_file, save_file

    _thinker(directory)
    weights = {f"thinker.{name}": weight.clone() for name, weight in load_file(directory / "model.safetensors").items()}
    weights["talker.model.embed_tokens.weight"] = torch.zeros(4, 4)
    weights["token2wav.code2wav_dit_model.proj_out.weight"] = torch.zeros(4, 4)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    thinker = json.loads((directory / "config.json").read_text())
    whole = {"model_type": "qwen2_5_omni", "thinker_config": thinker, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(whole))


def _qwen2_audio(directory: Path) -> None:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    audio = {
        "encoder_layers": 2,
        "d_model": WIDTH,
        "encoder_attention_heads": HEADS,
        "encoder_ffn_dim": 96,
        "num_mel_bins": 32,
        "max_source_positions": 200,
    }
    config = Qwen2AudioConfig(audio_config=audio, text_config={"model_type": "qwen2", **_text()}, audio_token_id=500)
    _save(Qwen2AudioForConditionalGeneration(config), directory, _extractor(32, chunk_length=4))


def _whisper(directory: Path) -> None:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=128,
        num_mel_bins=32,
        encoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_layers=1,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        d_model=WIDTH,
        max_source_positions=200,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    _save(WhisperForConditionalGeneration(config), directory, _extractor(32, chunk_length=4))


def _tower(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "image_size": 56,
        "patch_size": 14,
        **more,
    }


def _siglip(directory: Path) -> None:
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    config = SiglipConfig(vision_config=_tower(), text_config=_small_text())
    processor = SiglipImageProcessor(size={"height": 56, "width": 56})
    _save(SiglipModel(config), directory, {"image_processor": processor})


def _siglip_vision(directory: Path) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    processor = SiglipImageProcessor(size={"height": 56, "width": 56})
    _save(SiglipVisionModel(SiglipVisionConfig(**_tower())), directory, {"image_processor": processor})


def _siglip_headless(directory: Path) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    processor = SiglipImageProcessor(size={"height": 56, "width": 56})
    config = SiglipVisionConfig(**_tower(), vision_use_head=False)
    _save(SiglipVisionModel(config), directory, {"image_processor": processor})
    # As language models' checkpoints have it: the setting is left out, and so is the head.
    config = json.loads((directory / "config.json").read_text())
    config.pop("vision_use_head")
    (directory / "config.json").write_text(json.dumps(config))


def _siglip2(directory: Path) -> None:
    from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

    # Patches of 16 and 256 of them: so says the class of the whole processor, whatever the files say.
    tower = {name: value for name, value in _tower(patch_size=16, num_patches=16).items() if name != "image_size"}
    config = Siglip2Config(vision_config=tower, text_config=_small_text())
    _save(Siglip2Model(config), directory, {"image_processor": Siglip2ImageProcessor()})


def _metaclip2(directory: Path) -> None:
    from transformers import CLIPImageProcessor, MetaClip2Config, MetaClip2Model

    config = MetaClip2Config(vision_config=_tower(), text_config=_small_text(), projection_dim=40)
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    _save(MetaClip2Model(config), directory, {"image_processor": processor})


def _clip(directory: Path) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    config = CLIPConfig(vision_config=_tower(), text_config=_small_text(), projection_dim=40)
    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    _save(CLIPModel(config), directory, {"image_processor": processor})


def _clip_vision(directory: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    _save(CLIPVisionModel(CLIPVisionConfig(**_tower())), directory, {"image_processor": processor})


def _clip_projection(directory: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    processor = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**_tower(projection_dim=24)))
    _save(model, directory, {"image_processor": processor})


def _dinov2(directory: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(**_tower(mlp_ratio=2))
    processor = BitImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    _save(Dinov2Model(config), directory, {"image_processor": processor})


def _small_text() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


BUILDERS: Mapping[str, Callable[[Path], None]] = {
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_5_vl_wide": _wide,
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_omni_thinker": _thinker,
    "qwen2_5_omni": _omni,
    "qwen2_audio": _qwen2_audio,
    "whisper": _whisper,
    "siglip": _siglip,
    "siglip_vision_model": _siglip_vision,
    "siglip_headless": _siglip_headless,
    "siglip2": _siglip2,
    "metaclip_2": _metaclip2,
    "clip": _clip,
    "clip_projection": _clip_projection,
    "clip_vision_model": _clip_vision,
    "dinov2": _dinov2,
}
