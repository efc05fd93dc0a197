"""Whisper's encoder, and what the audio towers that descend from it share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from encode_server.models.families.base import Family, Item, stack
from encode_server.models.prepared import Prepared
from encode_server.wire.modality import Modality

_LEAST_FRAMES = 100


class Whisper(Family):
    """The encoder alone: its last hidden state over the 30 s window the extractor pads or cuts to."""

    def model_class(self) -> tuple[Any, Any]:
        from transformers.models.whisper.modeling_whisper import WhisperConfig, WhisperEncoder

        return WhisperEncoder, WhisperConfig.from_dict(dict(self.checkpoint.config))

    def dims(self, model: Any) -> dict[Modality, int]:
        return {Modality.AUDIO: int(model.config.d_model)}

    def forward(
        self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device
    ) -> list[torch.Tensor]:
        features = stack(items, "input_features", device, model.dtype)
        return list(model(features, return_dict=True).last_hidden_state)

    def prepare_audio(self, extractor: Any, samples: npt.NDArray[np.float32]) -> Prepared:
        output = extractor(
            samples, sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="pt"
        )
        features = output["input_features"][0].contiguous()
        frames = features.shape[1]
        return Prepared(
            tensors={"input_features": features},
            tokens=(frames - 1) // 2 + 1,
            cost=frames,
            extra={"mel_frames": int(output["attention_mask"][0].sum())},
        )


def pooled_length(frames: int) -> int:
    """Tokens of `frames` mel frames after the convolution and the pooling, each of stride 2: transformers'
    `_get_feat_extract_output_lengths`."""
    return (((frames - 1) // 2 + 1) - 2) // 2 + 1


def pad_to_one_token(samples: npt.NDArray[np.float32], extractor: Any) -> npt.NDArray[np.float32]:
    """`samples`, followed by silence if they are too short (below 3 mel frames, 30 ms) to give a single token."""
    return np.pad(samples, (0, max(0, 3 * int(extractor.hop_length) - len(samples))))


def padded_length(count: int, extractor: Any) -> int:
    """Samples to pad to (or cut at), so that frames of the audio come out as the extractor's own padding gives them.

    The extractor pads to 30 or 300 s: up to half a second of work for each audio, and the padding is dropped again. A
    frame sees one window beyond the end. At least one second, because much shorter products round differently.
    """
    hop = int(extractor.hop_length)
    frames = max(-(-count // hop) + -(-int(extractor.n_fft) // hop), _LEAST_FRAMES)
    return min(frames * hop, int(extractor.n_samples))
