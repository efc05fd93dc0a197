"""Image towers that stand alone: SigLIP, CLIP, DINOv2. The embedding is the last hidden state, or one vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from encode_server.models.checkpoint import stored_tensors, weight_files
from encode_server.models.families.base import Family, Item, stack
from encode_server.models.prepared import Prepared
from encode_server.wire.modality import Modality


class ImageTower(Family):
    """A vision transformer over images of the size its image processor makes."""

    class_token = True

    def sizes_freely(self, processor: Any) -> bool:
        return False

    def dims(self, model: Any) -> dict[Modality, int]:
        return {Modality.IMAGE: int(model.config.hidden_size)}

    def pooled_dims(self, model: Any) -> dict[Modality, int]:
        return self.dims(model)

    def forward(
        self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device
    ) -> list[torch.Tensor]:
        return self._encode(model, items, device, lambda output: output.last_hidden_state)

    def pooled(self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device) -> list[torch.Tensor]:
        return self._encode(model, items, device, lambda output: self.vectors(model, output).unsqueeze(1))

    def vectors(self, model: Any, output: Any) -> torch.Tensor:
        """[batch, width] of the tower's output for a batch: what `get_image_features` of transformers gives."""
        vectors: torch.Tensor = output.pooler_output
        return vectors

    def holds(self, name: str) -> bool:
        """Whether the checkpoint's files hold a tensor whose name ends in `name`."""
        return any(key.endswith(name) for file in weight_files(self.checkpoint) for key in stored_tensors(file))

    def _encode(
        self, model: Any, items: Sequence[Item], device: torch.device, read: Callable[[Any], torch.Tensor]
    ) -> list[torch.Tensor]:
        """What `read` takes of the tower's output, item by item."""
        by_shape: dict[torch.Size, list[int]] = {}
        for index, item in enumerate(items):
            by_shape.setdefault(item["pixel_values"].shape, []).append(index)
        embeddings: dict[int, torch.Tensor] = {}
        for indices in by_shape.values():
            pixels = stack([items[index] for index in indices], "pixel_values", device, model.dtype)
            embeddings.update(zip(indices, read(model(pixels, return_dict=True)), strict=True))
        return [embeddings[index] for index in range(len(items))]

    def prepare_image(self, processor: Any, image: Image.Image, options: Mapping[str, Any]) -> Prepared:
        pixels = processor(images=[image], return_tensors="pt", **options)["pixel_values"][0].contiguous()
        height, width = pixels.shape[-2:]
        patch = self.patch_size()
        tokens = int(self.class_token) + (height // patch) * (width // patch)
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

        config = self.config()
        if not self.holds("visual_projection.weight"):
            return CLIPVisionModel, config
        # Of the whole model where the checkpoint is one, whose vision part may say another width.
        config.projection_dim = self.checkpoint.config.get("projection_dim", config.projection_dim)
        return _projected(CLIPVisionModel), config

    def pooled_dims(self, model: Any) -> dict[Modality, int]:
        projects = hasattr(model, "visual_projection")
        return {Modality.IMAGE: int(model.config.projection_dim)} if projects else self.dims(model)

    def vectors(self, model: Any, output: Any) -> torch.Tensor:
        vectors: torch.Tensor = output.pooler_output
        return model.visual_projection(vectors) if hasattr(model, "visual_projection") else vectors


class Siglip(ImageTower):
    """SigLIP's vision tower. The last hidden state doesn't pass through the pooling head, which only the one vector of
    an item needs, and which not every checkpoint has."""

    class_token = False

    def config(self) -> Any:
        from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

        return SiglipVisionConfig.from_dict(self.vision_part())

    def model_class(self) -> tuple[Any, Any]:
        from transformers.models.siglip.modeling_siglip import SiglipVisionModel

        config = self.config()
        config.vision_use_head = self.holds("head.probe")
        return SiglipVisionModel, config

    def load(self, dtype: torch.dtype) -> nn.Module:
        model = super().load(dtype)
        # Its head is run for the items whose vector is wanted, and not by its own forward for all.
        _tower(model).use_head = False
        return model

    def pooled_dims(self, model: Any) -> dict[Modality, int]:
        return self.dims(model) if hasattr(_tower(model), "head") else {}

    def vectors(self, model: Any, output: Any) -> torch.Tensor:
        vectors: torch.Tensor = _tower(model).head(output.last_hidden_state)
        return vectors


class Dinov2(ImageTower):
    """DINOv2's backbone, from a checkpoint of its own or of a classifier."""

    def config(self) -> Any:
        from transformers.models.dinov2.configuration_dinov2 import Dinov2Config

        return Dinov2Config.from_dict(dict(self.checkpoint.config))

    def model_class(self) -> tuple[Any, Any]:
        from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

        return Dinov2Model, self.config()


def _projected(tower_class: Any) -> Any:
    """A subclass of CLIP's vision tower with the projection that a whole CLIP has beside the tower.

    transformers looks classes up by name and module, so the subclass keeps both.
    """

    class Projected(tower_class):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
            self.post_init()

    Projected.__name__, Projected.__qualname__ = tower_class.__name__, tower_class.__qualname__
    Projected.__module__ = tower_class.__module__
    return Projected


def _tower(model: Any) -> Any:
    """The tower itself; older releases of transformers wrap it."""
    return getattr(model, "vision_model", model)
