"""Image towers that stand alone: SigLIP, CLIP, their successors, DINOv2.

The embedding is the last hidden state, or one vector.
"""

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
            output = self.run(model, [items[index] for index in indices], device)
            embeddings.update(zip(indices, read(output), strict=True))
        return [embeddings[index] for index in range(len(items))]

    def run(self, model: Any, items: Sequence[Item], device: torch.device) -> Any:
        """The tower's output for items of one shape."""
        return model(stack(items, "pixel_values", device, model.dtype), return_dict=True)

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

    def tower_class(self) -> Any:
        """transformers' class of the tower alone."""
        from transformers.models.clip.modeling_clip import CLIPVisionModel

        return CLIPVisionModel

    def model_class(self) -> tuple[Any, Any]:
        config = self.config()
        if not self.holds("visual_projection.weight"):
            return self.tower_class(), config
        # Of the whole model where the checkpoint is one, whose vision part may say another width.
        config.projection_dim = self.checkpoint.config.get("projection_dim", config.projection_dim)
        return _projected(self.tower_class()), config

    def pooled_dims(self, model: Any) -> dict[Modality, int]:
        projects = hasattr(model, "visual_projection")
        return {Modality.IMAGE: int(model.config.projection_dim)} if projects else self.dims(model)

    def vectors(self, model: Any, output: Any) -> torch.Tensor:
        vectors: torch.Tensor = output.pooler_output
        return model.visual_projection(vectors) if hasattr(model, "visual_projection") else vectors


class MetaClip2(Clip):
    """MetaCLIP 2's vision tower: CLIP's under other names."""

    def config(self) -> Any:
        from transformers.models.metaclip_2.configuration_metaclip_2 import MetaClip2VisionConfig

        return MetaClip2VisionConfig.from_dict(self.vision_part())

    def tower_class(self) -> Any:
        from transformers.models.metaclip_2.modeling_metaclip_2 import MetaClip2VisionModel

        return MetaClip2VisionModel


class Siglip(ImageTower):
    """SigLIP's vision tower. The last hidden state doesn't pass through the pooling head, which only the one vector of
    an item needs, and which not every checkpoint has."""

    class_token = False

    def config(self) -> Any:
        from transformers.models.siglip.configuration_siglip import SiglipVisionConfig

        return SiglipVisionConfig.from_dict(self.vision_part())

    def tower_class(self) -> Any:
        """transformers' class of the tower alone."""
        from transformers.models.siglip.modeling_siglip import SiglipVisionModel

        return SiglipVisionModel

    def model_class(self) -> tuple[Any, Any]:
        config = self.config()
        config.vision_use_head = self.holds("head.probe")
        return self.tower_class(), config

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


class Siglip2(Siglip):
    """SigLIP 2's tower for images of any shape (NaFlex). A row is a patch of the image; padding has none.

    Released checkpoints of a fixed image size say that they are SigLIP, and are.
    """

    def config(self) -> Any:
        from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

        return Siglip2VisionConfig.from_dict(self.vision_part())

    def tower_class(self) -> Any:
        from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionModel

        return Siglip2VisionModel

    def run(self, model: Any, items: Sequence[Item], device: torch.device) -> Any:
        pixels = stack(items, "pixel_values", device, model.dtype)
        # All images of this call have the same number of patches: nothing is padded, so there is no mask. The tower
        # reads the shapes on the CPU.
        shapes = torch.stack([item["spatial_shapes"] for item in items])
        return model(pixels, pixel_attention_mask=None, spatial_shapes=shapes, return_dict=True)

    def prepare_image(self, processor: Any, image: Image.Image, options: Mapping[str, Any]) -> Prepared:
        output = processor(images=[image], return_tensors="pt", **options)
        shape = output["spatial_shapes"][0]
        height, width = map(int, shape)
        tokens = height * width
        pixels = output["pixel_values"][0, :tokens].contiguous()
        return Prepared(
            tensors={"pixel_values": pixels, "spatial_shapes": shape.contiguous()},
            tokens=tokens,
            cost=tokens,
            pairs=tokens * tokens,
            grid_thw=(1, height, width),
        )


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
