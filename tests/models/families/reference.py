"""What the language model of a whole checkpoint receives for one item, in the model's own forward.

Nothing of encode_server is used here: transformers' own processor, whole model, default attention, one item per call.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image

from encode_server.wire.modality import Modality

_PROMPTS = {
    ("gemma3", Modality.IMAGE): "<boi>",
    ("glm4v", Modality.VIDEO): "<|begin_of_video|><|video|><|end_of_video|>",
    ("glm4v_moe", Modality.VIDEO): "<|begin_of_video|><|video|><|end_of_video|>",
    ("glm46v", Modality.VIDEO): "<|begin_of_video|><|video|><|end_of_video|>",
    ("glm5_next", Modality.VIDEO): "<|begin_of_video|><|video|><|end_of_video|>",
}
"""Where a prompt of one placeholder is not the processor's `<modality>_token`."""


class _Reached(Exception):
    pass


class Whole:
    """A whole checkpoint in transformers."""

    def __init__(self, family: str, path: Path, dtype: torch.dtype = torch.float32) -> None:
        self._family = family
        config = transformers.AutoConfig.from_pretrained(path)
        self._processor = transformers.AutoProcessor.from_pretrained(path)
        cls = getattr(transformers, config.architectures[0])
        self.model: Any = cls.from_pretrained(path, dtype=dtype).eval()

    def image(self, pixels: npt.NDArray[np.uint8], **options: Any) -> torch.Tensor:
        """[tokens, dim] of uint8 pixels [height, width, 3]; DeepStack levels appended along dim."""
        return self._receive(Modality.IMAGE, images=[Image.fromarray(pixels)], **options)

    def video(self, frames: npt.NDArray[np.uint8], fps: float) -> torch.Tensor:
        """[tokens, dim] of uint8 frames [n, height, width, 3]; the processor chooses among them."""
        metadata = transformers.video_utils.VideoMetadata(
            total_num_frames=len(frames),
            fps=fps,
            duration=len(frames) / fps,
            height=frames.shape[1],
            width=frames.shape[2],
        )
        metadata.frames_indices = list(range(len(frames)))
        return self._receive(Modality.VIDEO, videos=[frames], video_metadata=[metadata])

    def audio(self, samples: npt.NDArray[np.float32]) -> torch.Tensor:
        """[tokens, dim] of mono samples at 16 kHz."""
        return self._receive(Modality.AUDIO, audio=[samples])

    @torch.inference_mode()
    def _receive(self, modality: Modality, **media: Any) -> torch.Tensor:
        if self._family == "voxtral":
            return self._forward(self._voxtral(**media))
        prompt = _PROMPTS.get((self._family, modality)) or getattr(self._processor, f"{modality}_token")
        inputs = self._processor(text=[prompt], return_tensors="pt", **media)
        return self._forward({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})

    def _voxtral(self, audio: list[npt.NDArray[np.float32]]) -> dict[str, torch.Tensor]:
        """Its processor takes bare audio in no way: windows of 4 s, 50 tokens each."""
        features = self._processor._retrieve_input_features(
            audio,
            400,
            sampling_rate=16_000,
            padding=True,
            truncation=False,
            pad_to_multiple_of=64_000,
            return_tensors="pt",
        )
        return {"input_features": features, "input_ids": torch.full((1, 50 * len(features)), 24)}

    def _forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        caught: dict[str, Any] = {}

        def reach(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
            caught.update(kwargs)
            raise _Reached

        decoder = self.model.get_decoder()
        hook = decoder.register_forward_pre_hook(reach, with_kwargs=True)
        takes = inspect.signature(type(self.model).forward).parameters
        try:
            self.model(
                **{
                    name: value.to(self.model.dtype) if value.is_floating_point() else value
                    for name, value in inputs.items()
                    if name in takes or name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
                }
            )
        except _Reached:
            pass
        finally:
            hook.remove()
        got = caught["inputs_embeds"][0]
        text = self.model.get_input_embeddings()(inputs["input_ids"])[0]
        differs = (got != text).any(-1)
        rows = got[differs] - text[differs] if self._family == "molmo2" else got[differs]
        levels = caught.get("deepstack_visual_embeds") or []
        return torch.cat([rows, *levels], dim=-1)
