"""Image towers that stand alone: SigLIP, CLIP, DINOv2. The embedding is the encoder's last hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from encode_server.models.families.base import Family, Item, stack
from encode_server.models.prepared import Prepared
from encode_server.wire.modality import Modality


class ImageTower(Family):
    """A vision transformer over images of the size its image processor makes."""

    class_tokens = 1

    def sizes_freely(self, processor: Any) -> bool:
        return False

    def dims(self, model: Any) -> dict[Modality, int]:
        return {Modality.IMAGE: int(model.config.hidden_size)}

    def forward(
        self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device
    ) -> list[torch.Tensor]:
        by_shape: dict[torch.Size, list[int]] = {}
        for index, item in enumerate(items):
            by_shape.setdefault(item["pixel_values"].shape, []).append(index)
        embeddings: dict[int, torch.Tensor] = {}
        for indices in by_shape.values():
            pixels = stack([items[index] for index in indices], "pixel_values", device, model.dtype)
            hidden = model(pixels, return_dict=True).last_hidden_state
            embeddings.update(zip(indices, hidden, strict=True))
        return [embeddings[index] for index in range(len(items))]

    def prepare_image(self, processor: Any, image: Image.Image, options: Mapping[str, Any]) -> Prepared:
        pixels = processor(images=[image], return_tensors="pt", **options)["pixel_values"][0].contiguous()
        height, width = pixels.shape[-2:]
        patch = self.patch_size()
        tokens = self.class_tokens + (height // patch) * (width // patch)
        return Prepared(tensors={"pixel_values": pixels}, tokens=tokens, cost=tokens)

    def patch_size(self) -> int:
        """Pixels along a patch's side."""
        return int(self.config().patch_size)

    def config(self) -> Any:
        """transformers' configuration of the vision tower."""
        raise NotImplementedError

    def vision_part(self) -> dict[str, Any]:
        """config.json of the tower: a part of a full model's, or the whole of a vision checkpoint's."""
        config = self.checkpoint.config
        return dict(config.get("vision_config", config))


class Clip(ImageTower):
    """CLIP's vision tower. Its last hidden state is the one before the post layer norm, as transformers returns it."""

    def config(self) -> Any:
        from transformers.models.clip.configuration_clip import CLIPVisionConfig

        return CLIPVisionConfig.from_dict(self.vision_part())

    def model_class(self) -> tuple[Any, Any]:
        from transformers.models.clip.modeling_clip import CLIPVisionModel

        return CLIPVisionModel, self.config()


class Siglip(ImageTower):
    """SigLIP's vision tower without the pooling head, which the last hidden state doesn't pass through."""

    class_tokens = 0

    def config(self) -> Any:
        from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

        return SiglipVisionConfig.from_dict(self.vision_part() | {"vision_use_head": False})

    def model_class(self) -> tuple[Any, Any]:
        from transformers.models.siglip.modeling_siglip import SiglipVisionModel

        return SiglipVisionModel, self.config()


class Dinov2(ImageTower):
    """DINOv2's backbone, from a checkpoint of its own or of a classifier."""

    def config(self) -> Any:
        from transformers.models.dinov2.configuration_dinov2 import Dinov2Config

        return Dinov2Config.from_dict(dict(self.checkpoint.config))

    def model_class(self) -> tuple[Any, Any]:
        from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

        return Dinov2Model, self.config()
