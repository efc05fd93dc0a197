"""Qwen2-Audio: a Whisper-style tower, pooled, and the projector into the language model's width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch

from encode_server.modality import Modality
from encode_server.models.families.base import Family, Item, without_language_model
from encode_server.models.families.whisper import ENCODER_PLAN, pad_to_one_token, pooled_length, stack
from encode_server.models.parallel import Plan
from encode_server.models.prepared import Prepared


class QwenAudio(Family):
    """Tower plus projector; only the tokens of real sound, as the language side consumes them."""

    plan: ClassVar[Plan] = {rf".*audio_tower\.{pattern}": style for pattern, style in ENCODER_PLAN.items()}

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
        features = stack(items, "input_features", device, model.dtype)
        frames = [int(item["mel_frames"]) for item in items]
        base = model.model if hasattr(model.model, "audio_tower") else model
        # keys that are padding are masked for every query, as transformers' Qwen2AudioModel.forward does
        valid = (torch.tensor(frames) - 1) // 2 + 1
        positions = torch.arange((features.shape[-1] - 2) // 2 + 1)
        mask = (positions < valid[:, None])[:, None, None, :].to(device)
        hidden = base.audio_tower(features, attention_mask=mask, return_dict=True).last_hidden_state
        kept = [row[: pooled_length(count)] for row, count in zip(hidden, frames, strict=True)]
        projected = base.multi_modal_projector(torch.cat(kept))
        return list(projected.split([len(row) for row in kept]))

    def prepare_audio(self, extractor: Any, samples: npt.NDArray[np.float32]) -> Prepared:
        samples = pad_to_one_token(samples, extractor)
        output = extractor(
            samples, sampling_rate=extractor.sampling_rate, return_attention_mask=True, return_tensors="pt"
        )
        features = output["input_features"][0].contiguous()
        frames = int(output["attention_mask"][0].sum())
        return Prepared(
            tensors={"input_features": features, "mel_frames": torch.tensor(frames)},
            tokens=pooled_length(frames),
            cost=features.shape[1],
            extra={"mel_frames": frames},
        )
