"""Voxtral's audio: whole windows of mel frames, each of one number of tokens.

Its processor takes audio only inside a chat request and counts the tokens there, with a package of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def wanted(processor: Any) -> bool:
    """Whether the rule is for this processor."""
    return type(processor).__name__ == "VoxtralProcessor"


def split(extractor: Any, config: Any, samples: npt.NDArray[np.float32]) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of mono `samples` at the extractor's rate, padded to whole windows, and their tokens."""
    output = extractor(
        samples,
        sampling_rate=extractor.sampling_rate,
        padding=True,
        truncation=False,
        pad_to_multiple_of=int(extractor.n_samples),
        return_tensors="pt",
    )
    frames = int(extractor.nb_max_frames)
    windows = output["input_features"].reshape(int(extractor.feature_size), -1, frames).transpose(0, 1).contiguous()
    audio = config.audio_config
    tokens = int(audio.max_source_positions) * int(audio.hidden_size) // int(audio.intermediate_size)
    return {"input_features": windows}, len(windows) * tokens
