"""The families without rules of their own that tests compare with transformers, and how their items share a call.

`tests/models/families` holds a tiny checkpoint of each: all that is said here is asserted there.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from encode_server.wire.checkpoint import Batching
from encode_server.wire.modality import Modality

IMAGE, VIDEO, AUDIO = Modality.IMAGE, Modality.VIDEO, Modality.AUDIO
PADDED, ROW, EQUAL, SHIFTED = Batching.PADDED, Batching.ROW, Batching.EQUAL, Batching.SHIFTED

TESTED: Mapping[str, Mapping[Modality, Batching]] = MappingProxyType(
    {
        "qwen3_5": {IMAGE: PADDED, VIDEO: PADDED},
        "qwen3_asr": {AUDIO: PADDED},
        "voxtral": {AUDIO: PADDED},
        "glm4v": {IMAGE: PADDED, VIDEO: PADDED},
        "kimi_k25": {IMAGE: PADDED},
        "ernie4_5_vl_moe": {IMAGE: PADDED, VIDEO: PADDED},
        "paddleocr_vl": {IMAGE: PADDED},
        "llava": {IMAGE: PADDED},
        "llava_next": {IMAGE: PADDED},
        "llava_onevision": {IMAGE: PADDED, VIDEO: EQUAL},
        "mistral3": {IMAGE: PADDED},
        "internvl": {IMAGE: PADDED, VIDEO: PADDED},
        "gemma3": {IMAGE: PADDED},
        "paligemma": {IMAGE: PADDED},
        "llama4": {IMAGE: PADDED},
        "minicpmv4_6": {IMAGE: ROW, VIDEO: ROW},
        "idefics3": {IMAGE: PADDED},
        "smolvlm": {IMAGE: PADDED, VIDEO: PADDED},
        "lfm2_vl": {IMAGE: PADDED},
        "cohere2_vision": {IMAGE: PADDED},
        "janus": {IMAGE: PADDED},
        "dots3_note": {IMAGE: PADDED, VIDEO: PADDED, AUDIO: PADDED},
        "glm5_next": {IMAGE: PADDED, VIDEO: PADDED},
        "glm4v_moe": {IMAGE: PADDED, VIDEO: PADDED},
        "glm46v": {IMAGE: PADDED, VIDEO: PADDED},
        "qwen3_5_moe": {IMAGE: PADDED, VIDEO: PADDED},
        "qwen3_omni_moe_thinker": {IMAGE: PADDED, VIDEO: PADDED, AUDIO: EQUAL},
        "gemma4": {IMAGE: PADDED, VIDEO: PADDED, AUDIO: PADDED},
        "molmo2": {IMAGE: SHIFTED, VIDEO: SHIFTED},
        "deepseek_ocr2": {IMAGE: PADDED},
    }
)
"""By the name in config.json."""

REFUSED: Mapping[str, Mapping[Modality, str]] = MappingProxyType(
    {"kimi_k25": {VIDEO: "transformers' own forward splits more rows than it has"}}
)
"""What a tested family has an encoder for and is not offered, and why."""

SURVEYED: Mapping[str, Mapping[Modality, Batching]] = MappingProxyType(
    {
        "audioflamingo3": {AUDIO: PADDED},
        "blip-2": {IMAGE: PADDED},
        "cosmos3_edge": {IMAGE: PADDED, VIDEO: PADDED},
        "exaone4_5": {IMAGE: PADDED, VIDEO: PADDED},
        "glmasr": {AUDIO: PADDED},
        "glmga": {IMAGE: PADDED, VIDEO: PADDED},
        "got_ocr2": {IMAGE: PADDED},
        "granite_docling": {IMAGE: PADDED},
        "hyperclovax_vision_v2": {IMAGE: PADDED, VIDEO: PADDED},
        "idefics2": {IMAGE: PADDED},
        "inkling2": {IMAGE: PADDED},
        "lfm3_vl": {IMAGE: PADDED, VIDEO: PADDED},
        "lighton_ocr": {IMAGE: PADDED},
        "llava_next_video": {IMAGE: PADDED, VIDEO: EQUAL},
        "minicpm_ocr": {IMAGE: ROW, VIDEO: ROW},
        "minicpmv4_7": {IMAGE: Batching.ALONE, VIDEO: Batching.ALONE},
        "moss_transcribe_diarize": {AUDIO: PADDED},
        "qianfan_ocr": {IMAGE: PADDED},
        "t5gemma2": {IMAGE: PADDED},
        "video_llama_3": {IMAGE: PADDED, VIDEO: PADDED},
        "video_llava": {IMAGE: PADDED, VIDEO: EQUAL},
        "vipllava": {IMAGE: PADDED},
    }
)
"""Families of which `tests/models/survey.py` makes a checkpoint from the default configuration, shrunk, that passes
what is checked when a checkpoint is loaded."""

NOTHING_RECEIVES = frozenset(
    (
        *("aimv2", "altclip", "blip", "chinese_clip", "clap", "clipseg", "flava", "groupvit"),
        *("nemotron3_5_asr", "nemotron_asr_streaming", "owlv2", "owlvit", "parakeet_rnnt", "parakeet_tdt"),
        *("sam2", "sam2_video", "sam3_tracker", "videoprism"),
    )
)
"""Families whose configurations name no token that media take the place of: nothing says which rows are right."""
