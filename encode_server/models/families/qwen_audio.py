"""Qwen2-Audio: a Whisper-style tower, pooled, and the projector into the language model's width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from encode_server.models.attention import Segments
from encode_server.models.families.base import Family, Item, without_language_model
from encode_server.models.families.whisper import pad_to_one_token, padded_length, pooled_length
from encode_server.models.prepared import Prepared
from encode_server.wire.modality import Modality

_REACH = 2  # mel frames behind the last frame of the audio that the convolutions look at for its position


class QwenAudio(Family):
    """Tower plus projector; only the tokens of the audio without its padding, as the language side consumes them."""

    def required(self, key: str) -> bool:
        return "audio_tower." in key or "multi_modal_projector." in key

    def model_class(self) -> tuple[Any, Any]:
        from transformers.models.qwen2_audio.modeling_qwen2_audio import (
            Qwen2AudioForConditionalGeneration as Qwen2Audio,
        )

        return Qwen2Audio, without_language_model(Qwen2Audio.config_class.from_dict(dict(self.checkpoint.config)))

    def dims(self, model: Any) -> dict[Modality, int]:
        return {Modality.AUDIO: int(model.config.text_config.hidden_size)}

    def forward(
        self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device
    ) -> list[torch.Tensor]:
        base = model.model if hasattr(model.model, "audio_tower") else model
        lengths = [(int(item["mel_frames"]) - 1) // 2 + 1 for item in items]
        hidden = _encode(base.audio_tower, items, lengths, device)
        projected = base.multi_modal_projector(torch.cat(hidden))
        return list(projected.split([len(row) for row in hidden]))

    def prepare_audio(self, extractor: Any, samples: npt.NDArray[np.float32]) -> Prepared:
        samples = pad_to_one_token(samples, extractor)
        output = extractor(
            samples,
            sampling_rate=extractor.sampling_rate,
            max_length=padded_length(len(samples), extractor),
            return_attention_mask=True,
            return_tensors="pt",
        )
        frames = int(output["attention_mask"][0].sum())
        features = output["input_features"][0, :, : frames + _REACH].contiguous()
        return Prepared(
            tensors={"input_features": features, "mel_frames": torch.tensor(frames)},
            tokens=pooled_length(frames),
            cost=frames,
            extra={"mel_frames": frames},
        )


def _encode(tower: Any, items: Sequence[Item], lengths: Sequence[int], device: torch.device) -> list[torch.Tensor]:
    """The tower over audio without padding, packed: `lengths` positions each after the convolutions, half as many out.

    transformers pads every audio to 30 s, runs the tower over all of them, and masks and drops the padding: the same
    result, for ten times the work where an audio lasts three seconds.
    """
    features = [item["input_features"].to(device, non_blocking=True).to(tower.dtype) for item in items]
    widest = max(feature.shape[1] for feature in features)
    hidden = torch.stack([functional.pad(feature, (0, widest - feature.shape[1])) for feature in features])
    for convolution in (tower.conv1, tower.conv2):
        hidden = functional.gelu(convolution(hidden))
    places = tower.embed_positions.weight
    rows = [row[:, :length].T + places[:length] for row, length in zip(hidden, lengths, strict=True)]
    packed = torch.cat(rows)[None]
    segments = Segments(lengths, device)
    for layer in tower.layers:
        packed = layer(packed, None, cu_seq_lens_q=segments.cu_seqlens, segments=(segments,))
    pooled = [tower.avg_pooler(row.T).T for row in torch.split(packed[0], list(lengths))]
    return [tower.layer_norm(row) for row in pooled]
