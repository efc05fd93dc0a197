"""What transformers itself makes of the same media: the reference every embedding is compared with."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import soundfile
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    WhisperFeatureExtractor,
)


class OmniReference:
    """The demo checkpoint (or another Qwen2.5-Omni thinker) run by transformers in this process, in float32."""

    def __init__(self, path: Path) -> None:
        self._model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
        self._images = AutoImageProcessor.from_pretrained(path)
        self._processor = AutoProcessor.from_pretrained(path)
        self._audio = WhisperFeatureExtractor.from_pretrained(path)

    @torch.inference_mode()
    def image(self, data: bytes, **options: Any) -> np.ndarray:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        inputs = self._images(images=[picture], return_tensors="pt", **options)
        features = self._model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
        return torch.cat(list(features.pooler_output)).numpy()

    @torch.inference_mode()
    def video(self, data: bytes) -> np.ndarray:
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate)
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        metadata = {"total_num_frames": len(frames), "fps": rate, "duration": len(frames) / rate}
        inputs = self._processor(
            text=[self._processor.video_token],
            videos=[frames],
            videos_kwargs={"video_metadata": [metadata]},
            return_tensors="pt",
        )
        features = self._model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        return torch.cat(list(features.pooler_output)).numpy()

    @torch.inference_mode()
    def audio(self, data: bytes) -> np.ndarray:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32")
        assert rate == self._audio.sampling_rate, "the reference does not resample"
        inputs = self._audio(
            samples, sampling_rate=rate, padding="max_length", return_attention_mask=True, return_tensors="pt"
        )
        features = self._model.get_audio_features(
            inputs["input_features"], feature_attention_mask=inputs["attention_mask"]
        )
        return features.last_hidden_state.numpy()
