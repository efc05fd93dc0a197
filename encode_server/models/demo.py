"""The embedded demo checkpoint: a small Qwen2.5-Omni thinker of seeded random weights, as an ordinary checkpoint.

It has both towers, their processors and a tokenizer, so transformers and engines load it like any other. Its
embeddings mean nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from encode_server.errors import StartupError

VERSION = 1
"""Raised with every change of the recipe, so that an older copy in the cache isn't taken for it."""

MODEL_TYPE = "qwen2_5_omni_thinker"
"""The architecture's name in the demo's config.json, known before the demo is written."""

_WIDTH = 128
_HEADS = 8
_VOCABULARY = 1024
_SPECIAL = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
_FIRST_SPECIAL = _VOCABULARY - len(_SPECIAL)
_README = """# Demo checkpoint of encode-server

A small Qwen2.5-Omni thinker: a vision tower, an audio tower, their processors, a tokenizer and a language model of one
layer. **Its weights are random** (seeded, so that they are the same everywhere): embeddings have the right shapes and
cost, and mean nothing. Written by `encode_server.models.demo`; safe to delete.
"""


def demo_path() -> Path:
    """The demo checkpoint's directory in the user's cache, written there on first use.

    Raises:
        StartupError: the cache directory cannot be written.
    """
    import platformdirs

    directory = platformdirs.user_cache_path("encode-server") / f"demo-omni-v{VERSION}"
    if not (directory / "config.json").is_file():
        _write_whole(directory)
    return directory


def write_demo(directory: Path) -> None:
    """Write the demo checkpoint to `directory`, which must not exist or be empty.

    Raises:
        StartupError: it holds something, or cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise StartupError(f"{directory} exists and is not an empty directory")
    _write_whole(directory)


def _write_whole(directory: Path) -> None:
    """All or nothing: written beside `directory`, then renamed. Of two processes at it, the first to rename wins."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise StartupError(f"the demo checkpoint cannot be written to {directory}: {error.strerror}") from error
    try:
        _write(draft)
        draft.chmod(0o755)
        try:
            os.rename(draft, directory)  # noqa: PTH104 - Path.rename would be the same
        except OSError as error:
            if not (directory / "config.json").is_file():
                raise StartupError(f"the demo checkpoint cannot be moved to {directory}: {error.strerror}") from error
    except OSError as error:
        raise StartupError(f"the demo checkpoint cannot be written to {directory}: {error.strerror}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(directory: Path) -> None:
    import torch
    from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerForConditionalGeneration

    from encode_server.models.weights import quiet

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2_5OmniThinkerForConditionalGeneration(_config())
        model.to(torch.bfloat16).save_pretrained(directory)
        _processor().save_pretrained(directory)
    (directory / "README.md").write_text(_README, encoding="utf-8")
    for file in directory.iterdir():
        file.chmod(0o644)


def _config() -> Any:
    from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig

    tokens = {name: _FIRST_SPECIAL + place for place, name in enumerate(_SPECIAL)}
    return Qwen2_5OmniThinkerConfig(
        vision_config={
            "depth": 4,
            "hidden_size": _WIDTH,
            "num_heads": _HEADS,
            "intermediate_size": 2 * _WIDTH,
            "out_hidden_size": _WIDTH,
            "fullatt_block_indexes": [1, 3],
        },
        audio_config={
            "encoder_layers": 2,
            "d_model": _WIDTH,
            "encoder_attention_heads": _HEADS,
            "encoder_ffn_dim": 2 * _WIDTH,
            "output_dim": _WIDTH,
        },
        text_config={
            "num_hidden_layers": 1,
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": _VOCABULARY,
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
        },
        image_token_id=tokens["image_token"],
        video_token_id=tokens["video_token"],
        audio_token_id=tokens["audio_token"],
        vision_start_token_id=tokens["vision_bos_token"],
        vision_end_token_id=tokens["vision_eos_token"],
        audio_start_token_id=tokens["audio_bos_token"],
        audio_end_token_id=tokens["audio_eos_token"],
        pad_token_id=0,
    )


def _processor() -> Any:
    from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor

    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(),
        video_processor=Qwen2VLVideoProcessor(do_sample_frames=True, fps=2, cap_pixels_per_frame=True),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=30, return_attention_mask=True),
        tokenizer=_tokenizer(),
    )


def _tokenizer() -> Any:
    """Bytes, then padding up to the special tokens: nothing is merged."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    words += [f"<unused{place}>" for place in range(_FIRST_SPECIAL - len(words))]
    bytes_only = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    bytes_only.pre_tokenizer, bytes_only.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = Qwen2Tokenizer(
        tokenizer_object=bytes_only,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=_SPECIAL,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(_SPECIAL.values())})
    return tokenizer
