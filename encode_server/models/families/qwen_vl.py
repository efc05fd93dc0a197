"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images and videos through one vision tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from encode_server.models.checkpoint import Checkpoint
from encode_server.models.families.base import Family, Item, without_language_model
from encode_server.models.layouts import Grid, VisionLayouts
from encode_server.models.patches import ImagePatches, VideoPatches
from encode_server.models.pixels import constants, pack, raw_options, unpack
from encode_server.models.prepared import Prepared
from encode_server.wire.modality import Modality


class QwenVision(Family):
    """The vision side that the VL and Omni models share."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self._layouts: VisionLayouts | None = None
        self._image_patches: dict[Any, ImagePatches | None] = {}
        self._video_patches: dict[Any, VideoPatches | None] = {}

    def prepare_image(self, processor: Any, image: Image.Image, options: Mapping[str, Any]) -> Prepared:
        if processor not in self._image_patches:
            self._image_patches[processor] = ImagePatches.of(processor)
        patches = self._image_patches[processor]
        if patches is not None and "device" not in options:
            pixels, grid = patches(image, options)
            return _prepared({"pixel_values": pixels, **constants(processor)}, grid, processor)
        output = processor(images=[image], return_tensors="pt", **raw_options(processor), **options)
        tensors = pack(output["pixel_values"], processor, still=True)
        return _prepared(tensors, output["image_grid_thw"][0].tolist(), processor)

    def prepare_video(
        self, processor: Any, frames: npt.NDArray[np.uint8], metadata: Any, options: Mapping[str, Any]
    ) -> Prepared:
        frames, metadata = at_least(int(processor.temporal_patch_size), frames, metadata)
        if processor not in self._video_patches:
            self._video_patches[processor] = VideoPatches.of(processor)
        patches = self._video_patches[processor]
        if patches is not None and "device" not in options:
            pixels, grid = patches(frames, options)
            prepared = _prepared({"pixel_values": pixels, **constants(processor)}, grid, processor)
        else:
            output = processor(
                videos=[frames],
                video_metadata=[metadata],
                do_sample_frames=False,
                input_data_format="channels_last",
                return_tensors="pt",
                **raw_options(processor),
                **options,
            )
            tensors = pack(output["pixel_values_videos"], processor, still=False)
            prepared = _prepared(tensors, output["video_grid_thw"][0].tolist(), processor)
        prepared.extra.update(self.video_extra(metadata, int(processor.temporal_patch_size)))
        return prepared

    def split(self, prepared: Prepared, max_cost: int) -> list[Prepared]:
        """A video is cut between temporal patches: no layer attends across them."""
        if prepared.grid_thw is None or prepared.cost <= max_cost or prepared.grid_thw[0] == 1:
            return [prepared]
        t, h, w = prepared.grid_thw
        step = max(1, max_cost // (h * w))
        pieces = []
        for start in range(0, t, step):
            length = min(step, t - start)
            pixels = prepared.tensors["pixel_values"][start * h * w : (start + length) * h * w]
            pieces.append(
                Prepared(
                    tensors=prepared.tensors | {"pixel_values": pixels, "grid_thw": torch.tensor((length, h, w))},
                    tokens=prepared.tokens // t * length,
                    cost=length * h * w,
                    pairs=length * (h * w) ** 2,
                    grid_thw=(length, h, w),
                )
            )
        return pieces

    def video_extra(self, metadata: Any, temporal_patch: int) -> dict[str, float | list[float]]:
        """What the language side's positions or prompt need of a video's timing."""
        if self.checkpoint.model_type.startswith("qwen3"):
            return {"video_timestamps": patch_timestamps(metadata.frames_indices, metadata.fps, temporal_patch)}
        if self.checkpoint.model_type == "qwen2_vl":
            return {}
        return {"second_per_grid_ts": temporal_patch / metadata.sampled_fps}

    def encode_vision(
        self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device
    ) -> list[torch.Tensor]:
        """[tokens, dim] per image or video; DeepStack levels follow the main embedding along dim."""
        tower = vision_tower(model)
        if self._layouts is None:
            self._layouts = VisionLayouts(tower.config)
        grids: list[Grid] = [tuple(item["grid_thw"].tolist()) for item in items]
        # Prefixed: transformers would take a plain cu_seqlens for the language model's and drop the argument.
        layout = {f"{modality}_{name}": value for name, value in self._layouts.batch(grids, device).items()}
        pixels = unpack(items, tower.config, device, tower.dtype)
        grid_thw = torch.tensor(grids)  # on the CPU: only split sizes are taken from it
        features = model.get_image_features if modality is Modality.IMAGE else model.get_video_features
        output = features(pixels, grid_thw, return_dict=True, **layout)
        counts = [len(part) for part in output.pooler_output]
        levels = [output.pooler_output]
        for level in getattr(output, "deepstack_features", None) or ():
            # transformers before 5.18 leaves these unsplit
            levels.append(torch.split(level, counts) if isinstance(level, torch.Tensor) else level)
        return [torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0] for parts in zip(*levels, strict=True)]


class QwenVL(QwenVision):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL (dense and mixture of experts)."""

    def required(self, key: str) -> bool:
        return "visual." in key

    def model_class(self) -> tuple[Any, Any]:
        model_type = self.checkpoint.model_type
        if model_type == "qwen2_vl":
            from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLForConditionalGeneration as model_class
        elif model_type == "qwen2_5_vl":
            from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (  # type: ignore[assignment]
                Qwen2_5_VLForConditionalGeneration as model_class,
            )
        elif model_type == "qwen3_vl":
            from transformers.models.qwen3_vl.modeling_qwen3_vl import (  # type: ignore[assignment]
                Qwen3VLForConditionalGeneration as model_class,
            )
        else:
            from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (  # type: ignore[assignment]
                Qwen3VLMoeForConditionalGeneration as model_class,
            )
        config = model_class.config_class.from_dict(dict(self.checkpoint.config))
        return model_class, without_language_model(config)

    def dims(self, model: Any) -> dict[Modality, int]:
        return dict.fromkeys((Modality.IMAGE, Modality.VIDEO), vision_dim(model))

    def forward(
        self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device
    ) -> list[torch.Tensor]:
        return self.encode_vision(model, modality, items, device)


def vision_tower(model: Any) -> Any:
    """The vision tower, wherever this version of transformers keeps it."""
    return model.model.visual if hasattr(model.model, "visual") else model.visual


def vision_dim(model: Any) -> int:
    """Width of an image token: the merger's, times one plus the number of DeepStack levels."""
    config = vision_tower(model).config
    width = int(config.hidden_size if config.model_type.startswith("qwen2_vl") else config.out_hidden_size)
    return width * (1 + len(getattr(config, "deepstack_visual_indexes", ())))


def at_least(count: int, frames: npt.NDArray[np.uint8], metadata: Any) -> tuple[npt.NDArray[np.uint8], Any]:
    """A clip shorter than one temporal patch, its last frame repeated, as processors fill the end of a longer one."""
    missing = count - len(frames)
    if missing > 0:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        metadata.frames_indices = [*metadata.frames_indices, *[metadata.frames_indices[-1]] * missing]
    return frames, metadata


def patch_timestamps(indices: Sequence[int], fps: float, temporal_patch: int) -> list[float]:
    """Seconds at the middle of each temporal patch: the mean of its first and last frame's time, as the prompt of
    transformers' `Qwen3VLProcessor` has it."""
    times = [index / fps for index in indices]
    times += [times[-1]] * (-len(times) % temporal_patch)
    return [(times[i] + times[i + temporal_patch - 1]) / 2 for i in range(0, len(times), temporal_patch)]


def _prepared(tensors: dict[str, torch.Tensor], grid: Sequence[int], processor: Any) -> Prepared:
    t, h, w = grid
    return Prepared(
        tensors=tensors | {"grid_thw": torch.tensor((t, h, w))},
        tokens=t * h * w // int(processor.merge_size) ** 2,
        cost=t * h * w,
        pairs=t * (h * w) ** 2,
        grid_thw=(t, h, w),
    )
