"""Qwen's image and video processors in two passes over the pixels: the processor's own resize, then one reordering.

On the way to the same bytes, the processors themselves copy an image three times and reorder it twice. A processor is
replaced only if it is of a known class, has the usual flags, and agrees on samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from encode_server.models.layouts import Grid

Bytes = npt.NDArray[np.uint8]
Planes = Sequence[Bytes]
"""The three channels of one frame, each contiguous [height, width]."""


class _Patches:
    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._patch, self._merge = int(processor.patch_size), int(processor.merge_size)

    def _resize(self, frames: torch.Tensor, options: Mapping[str, Any], **more: Any) -> torch.Tensor:
        """The processor's own resize. `frames`: uint8 [..., 3, height, width].

        The channels may lie interleaved: torch then resizes to the same values in half the time.
        """
        processor = self._processor
        factor = self._patch * self._merge
        resized: torch.Tensor = processor.resize(
            frames, size=_size(processor, options), resample=processor.resample, factor=factor, **more
        )
        return resized

    def _cut(self, frames: Iterable[Planes], height: int, width: int, count: int, temporal: int) -> torch.Tensor:
        """`count` frames, `temporal` to a patch, as uint8 [patches, channels × temporal × height × width].

        Patches that the tower merges follow each other. The last frame is repeated to fill the last patch.
        """
        patch, merge = self._patch, self._merge
        rows, columns = height // (patch * merge), width // (patch * merge)
        steps = -(-count // temporal)
        out = np.empty((steps, rows, columns, merge, merge, 3, temporal, patch, patch), np.uint8)
        runs = out.view(f"V{patch}")[..., 0]  # a patch's row as one element: numpy copies it in one move
        for number, planes in enumerate(frames):
            step, place = divmod(number, temporal)
            for channel, plane in enumerate(planes):
                lines = plane.view(f"V{patch}").reshape(rows, merge, patch, columns, merge)
                runs[step, ..., channel, place, :] = lines.transpose(0, 3, 1, 4, 2)
        if filled := count % temporal:
            out[-1, ..., filled:, :, :] = out[-1, ..., filled - 1 : filled, :, :]
        return torch.from_numpy(out.reshape(steps * rows * columns * merge * merge, -1))


class ImagePatches(_Patches):
    """What `Qwen2VLImageProcessor` makes of an image, with neither rescaling nor normalisation."""

    @classmethod
    def of(cls, processor: Any) -> ImagePatches | None:
        """None unless `processor` does what this class does."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

        if type(processor) is not Qwen2VLImageProcessor or not _usual(processor):
            return None
        patches = cls(processor)
        return patches if patches._agrees() else None

    def __call__(self, image: Image.Image, options: Mapping[str, Any]) -> tuple[torch.Tensor, Grid]:
        """uint8 [patches, channels × height × width] of an RGB image, and its grid.

        `options`: `size` as the processor takes it, or nothing. A still image's patches hold one frame.

        Raises:
            ValueError: the processor refuses the image's shape.
        """
        planes: Planes
        if self._fits(image, options):
            # Pillow separates the channels while it copies the pixels out: quicker than numpy can do it afterwards.
            planes = [_plane(image, channel) for channel in "RGB"]
        else:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
            planes = _separate(self._resize(pixels[None], options)[0])
        height, width = planes[0].shape
        grid = (1, height // self._patch, width // self._patch)
        return self._cut([planes], height, width, 1, 1), grid

    def _fits(self, image: Image.Image, options: Mapping[str, Any]) -> bool:
        """Whether the processor would leave the size as it is."""
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        size = _size(self._processor, options)
        factor = self._patch * self._merge
        new = smart_resize(image.height, image.width, factor, size.shortest_edge, size.longest_edge)
        return bool(new == (image.height, image.width))

    def _agrees(self) -> bool:
        noise, options = _samples(self._processor)
        for pixels in noise:
            image = Image.fromarray(pixels)
            try:
                patches, grid = self(image, options)
                output = self._processor([image], do_rescale=False, do_normalize=False, return_tensors="pt", **options)
            except Exception:
                return False  # Another release of transformers: whatever fails, the processor itself can be asked.
            frames = int(self._processor.temporal_patch_size)
            repeated = patches.view(len(patches), 3, 1, -1).expand(-1, -1, frames, -1).reshape(len(patches), -1)
            if not torch.equal(repeated, output["pixel_values"]) or [list(grid)] != output["image_grid_thw"].tolist():
                return False
        return True


class VideoPatches(_Patches):
    """What `Qwen2VLVideoProcessor` and `Qwen3VLVideoProcessor` make of frames, neither rescaled nor normalised."""

    @classmethod
    def of(cls, processor: Any) -> VideoPatches | None:
        """None unless `processor` does what this class does."""
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
        from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

        if type(processor) not in (Qwen2VLVideoProcessor, Qwen3VLVideoProcessor) or not _usual(processor):
            return None
        patches = cls(processor)
        return patches if patches._agrees() else None

    def __call__(self, frames: Bytes, options: Mapping[str, Any]) -> tuple[torch.Tensor, Grid]:
        """uint8 [patches, channels × frames × height × width] of frames [n, height, width, 3], and their grid.

        Raises:
            ValueError: the processor refuses the frames' shape.
        """
        temporal = int(self._processor.temporal_patch_size)
        resized = self._resize(
            torch.from_numpy(frames).permute(0, 3, 1, 2)[None],
            options,
            temporal_factor=temporal,
            cap_pixels_per_frame=bool(self._processor.cap_pixels_per_frame),
        )[0]
        count, _, height, width = resized.shape
        grid = (-(-count // temporal), height // self._patch, width // self._patch)
        return self._cut((_separate(frame) for frame in resized), height, width, count, temporal), grid

    def _agrees(self) -> bool:
        noise, options = _samples(self._processor)
        for pixels in noise:
            frames = np.stack([pixels, pixels[::-1], pixels[:, ::-1]])
            try:
                patches, grid = self(frames, options)
                output = self._processor(
                    [frames],
                    do_sample_frames=False,
                    input_data_format="channels_last",
                    do_rescale=False,
                    do_normalize=False,
                    return_tensors="pt",
                    **options,
                )
            except Exception:
                return False
            want, wanted_grid = output["pixel_values_videos"], output["video_grid_thw"].tolist()
            if not torch.equal(patches, want) or [list(grid)] != wanted_grid:
                return False
        return True


def _usual(processor: Any) -> bool:
    return bool(
        processor.do_resize
        and processor.do_rescale
        and processor.do_normalize
        and not getattr(processor, "do_center_crop", None)
        and not getattr(processor, "do_pad", None)
        and getattr(processor, "device", None) in (None, "cpu")
    )


def _size(processor: Any, options: Mapping[str, Any]) -> Any:
    from transformers.image_utils import SizeDict

    return SizeDict(**options["size"]) if "size" in options else processor.size


def _samples(processor: Any) -> tuple[list[Bytes], dict[str, Any]]:
    """Two images of noise, and options with which the processor resizes the first and keeps the second's size."""
    factor = int(processor.patch_size) * int(processor.merge_size)
    noise = np.random.default_rng(0).integers(0, 256, (2 * factor, 3 * factor, 3), dtype=np.uint8)
    bounds = {"shortest_edge": factor**2, "longest_edge": 64 * factor**2}
    return [noise[:-5, :-9], noise], {"size": bounds}


def _plane(image: Image.Image, channel: str) -> Bytes:
    return np.frombuffer(image.tobytes("raw", channel), np.uint8).reshape(image.height, image.width)


def _separate(frame: torch.Tensor) -> Planes:
    return [np.ascontiguousarray(plane) for plane in frame.numpy()]
