"""transformers run the ordinary way on a whole checkpoint: what every embedding is compared with.

Nothing of encode_server is used here: own processor, whole model, default attention, one call per item.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image

_CLASSES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_5_vl_wide": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen2_5_omni_thinker": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen2_audio": "Qwen2AudioForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2": "Siglip2Model",
    "metaclip_2": "MetaClip2Model",
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "dinov2": "Dinov2Model",
}


class Reference:
    """A whole checkpoint in transformers, fp32."""

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        self.path = path
        self.model: Any = getattr(transformers, _CLASSES[name]).from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def image(self, picture: npt.NDArray[np.uint8]) -> torch.Tensor:
        """[tokens, dim]; DeepStack levels appended along dim."""
        inputs = image_inputs(self.path, picture)
        if not self.name.startswith("qwen"):
            tower = getattr(self.model, "vision_model", self.model)
            rows = tower(**inputs).last_hidden_state[0]
            # SigLIP 2 pads every image to one number of patches; rows of padding mean nothing.
            return rows[inputs["pixel_attention_mask"][0].bool()] if "pixel_attention_mask" in inputs else rows
        return _levels(self.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]))

    @torch.inference_mode()
    def video(self, inputs: Any) -> torch.Tensor:
        """[tokens, dim] of a video processor's output."""
        return _levels(self.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"]))

    @torch.inference_mode()
    def audio(self, sound: npt.NDArray[np.float32]) -> torch.Tensor:
        """[tokens, dim] of what the language side consumes; Whisper: the encoder's last hidden state."""
        inputs = audio_inputs(self.path, sound)
        features, mask = inputs["input_features"], inputs["attention_mask"]
        if self.name == "whisper":
            return self.model.model.encoder(features).last_hidden_state[0]
        if self.name == "qwen2_audio":
            return self._qwen2_audio(features, mask)
        return self.model.get_audio_features(features, feature_attention_mask=mask).last_hidden_state

    def _qwen2_audio(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """What arrives at the language model's input in the model's own forward, at the audio tokens' places."""
        base = getattr(self.model, "model", self.model)
        tokens = ((int(mask.sum()) - 1) // 2 + 1 - 2) // 2 + 1
        token_id = self.model.config.audio_token_id
        caught: dict[str, torch.Tensor] = {}
        hook = base.language_model.register_forward_pre_hook(
            lambda _module, _args, kwargs: caught.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
        )
        ids = torch.full((1, tokens), token_id)
        try:
            self.model(
                input_ids=ids, input_features=features, feature_attention_mask=mask, attention_mask=torch.ones_like(ids)
            )
        finally:
            hook.remove()
        return caught["embeds"][0]


def image_inputs(path: Path, picture: npt.NDArray[np.uint8], **options: Any) -> Any:
    """The checkpoint's own image processor's output."""
    return transformers.AutoImageProcessor.from_pretrained(path)(
        images=[Image.fromarray(picture)], return_tensors="pt", **options
    )


def audio_inputs(path: Path, sound: npt.NDArray[np.float32]) -> Any:
    """The checkpoint's own feature extractor's output."""
    extractor = transformers.AutoFeatureExtractor.from_pretrained(path)
    return extractor(sound, sampling_rate=16_000, return_attention_mask=True, return_tensors="pt")


def _levels(output: Any) -> torch.Tensor:
    """The only item's main embedding and DeepStack levels; older transformers leave the levels unsplit."""
    levels = [output.pooler_output[0]]
    for level in getattr(output, "deepstack_features", None) or ():
        levels.append(level if isinstance(level, torch.Tensor) else level[0])
    return torch.cat(levels, dim=-1)


def video_inputs(path: Path, data: bytes, **options: Any) -> Any:
    """What the checkpoint's own processor makes of every frame of a GIF, sampling as its configuration says.

    The whole processor where the checkpoint has one: its class may set other sizes than its video processor's files.
    """
    frames, fps = frames_of(data)
    metadata = transformers.video_utils.VideoMetadata(
        total_num_frames=len(frames), fps=fps, duration=len(frames) / fps, height=frames.shape[1], width=frames.shape[2]
    )
    if (path / "tokenizer_config.json").exists():
        processor = transformers.AutoProcessor.from_pretrained(path)
        return processor(
            text=[processor.video_token],
            videos=[frames],
            videos_kwargs={"video_metadata": [metadata], **options},
            return_tensors="pt",
        )
    processor = transformers.AutoVideoProcessor.from_pretrained(path)
    return processor(videos=[frames], video_metadata=[metadata], return_tensors="pt", return_metadata=True, **options)


def frames_of(data: bytes) -> tuple[npt.NDArray[np.uint8], float]:
    """All frames of a clip, uint8 [n, height, width, 3], and how many there are per second."""
    import av

    with av.open(BytesIO(data)) as container:
        fps = float(container.streams.video[0].average_rate or 0)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), fps
