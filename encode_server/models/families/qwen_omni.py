"""Qwen2.5-Omni, whole or thinker only: a Qwen2.5-VL vision tower and an audio tower over two-second chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from encode_server.models.attention import Segments
from encode_server.models.families.base import Item, without_language_model
from encode_server.models.families.qwen_vl import QwenVision, vision_dim
from encode_server.models.families.whisper import pad_to_one_token, padded_length, pooled_length
from encode_server.models.prepared import Prepared
from encode_server.models.transfer import to_device
from encode_server.wire.modality import Modality


class QwenOmni(QwenVision):
    """The thinker's towers; talker and token2wav are never read."""

    def required(self, key: str) -> bool:
        return "visual." in key or "audio_tower." in key

    def model_class(self) -> tuple[Any, Any]:
        from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
            Qwen2_5OmniThinkerForConditionalGeneration as Thinker,
        )

        config = dict(self.checkpoint.config)
        config = dict(config.get("thinker_config", config))
        return Thinker, without_language_model(Thinker.config_class.from_dict(config))

    def dims(self, model: Any) -> dict[Modality, int]:
        image = vision_dim(model)
        audio = int(_audio_tower(model).config.output_dim)
        return {Modality.IMAGE: image, Modality.VIDEO: image, Modality.AUDIO: audio}

    def forward(
        self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device
    ) -> list[torch.Tensor]:
        if modality is Modality.AUDIO:
            return self._encode_audio(_audio_tower(model), items, device)
        return self.encode_vision(model, modality, items, device)

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
        return Prepared(
            tensors={"input_features": output["input_features"][0, :, :frames].contiguous()},
            tokens=pooled_length(frames),
            cost=frames,
            extra={"mel_frames": frames},
        )

    def _encode_audio(self, tower: Any, items: Sequence[Item], device: torch.device) -> list[torch.Tensor]:
        """The tower as `get_audio_features` calls it, given what that method would compute from the lengths.

        That method wants the batch padded to its longest audio and reads lengths back from the device.
        """
        lengths = [item["input_features"].shape[1] for item in items]
        size = 2 * int(tower.n_window)
        chunks: list[int] = []
        for length in lengths:
            chunks += [size] * (length // size) + ([length % size] if length % size else [])
        features = [item["input_features"].to(device, non_blocking=True).to(tower.dtype) for item in items]
        pieces = [piece for feature in features for piece in torch.split(feature, size, dim=1)]
        widest = max(chunks)
        padded = torch.stack([functional.pad(piece, (0, widest - piece.shape[1])) for piece in pieces])
        segments = Segments([(chunk - 1) // 2 + 1 for chunk in chunks], device)
        output = tower(
            None,
            feature_lens=torch.tensor(lengths),
            padded_feature=padded,
            chunk_lengths=to_device(torch.tensor(chunks), device),
            valid_indices=to_device(_valid_indices(segments.lengths), device),
            pool_indices=to_device(_pool_indices([(length - 1) // 2 + 1 for length in lengths]), device),
            cu_seqlens=segments.cu_seqlens,
            max_seqlen=segments.longest,
            segments=(segments,),
            return_dict=True,
        )
        return list(output.last_hidden_state.split([pooled_length(length) for length in lengths]))


def _valid_indices(lengths: Sequence[int]) -> torch.Tensor:
    """Positions that are not padding in a flattened [chunks, longest] grid."""
    longest = max(lengths)
    return torch.cat([torch.arange(length) + row * longest for row, length in enumerate(lengths)])


def _pool_indices(lengths: Sequence[int]) -> torch.Tensor:
    """First position of each pair that the pooling of stride 2 averages, in a packed batch of audio."""
    indices, start = [], 0
    for length in lengths:
        indices.append(start + 2 * torch.arange(length // 2))
        start += length
    return torch.cat(indices)


def _audio_tower(model: Any) -> Any:
    return model.model.audio_tower if hasattr(model.model, "audio_tower") else model.audio_tower
