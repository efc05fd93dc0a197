"""What a family answers for its architecture. Modelling code is imported inside the methods that ranks call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from encode_server.models.checkpoint import Checkpoint
from encode_server.models.prepared import Prepared
from encode_server.models.processors import load_part
from encode_server.models.registry import check_supported
from encode_server.models.speedups import Speedup
from encode_server.models.weights import load_model, quiet
from encode_server.wire.modality import Modality

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from PIL import Image
    from torch import nn

Item = Mapping[str, torch.Tensor]
"""One media item's CPU tensors, as in `Prepared.tensors`; never written to."""


class Family(ABC):
    """An architecture's weights, forward and preprocessing. One instance per process and checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @property
    def modalities(self) -> frozenset[Modality]:
        """What the checkpoint has an encoder and a processor for."""
        return check_supported(self.checkpoint).modalities

    # What ranks call.

    @property
    def speedups(self) -> frozenset[Speedup]:
        """Changes for speed that leave the rows of this family alone."""
        return frozenset(Speedup)

    @property
    def whole(self) -> frozenset[str]:
        """Classes of modules that tensor parallelism must not cut, though they look as if it could."""
        return frozenset()

    def load(self, dtype: torch.dtype) -> nn.Module:
        """The encoder on the CPU.

        Raises:
            StartupError: tensors are missing or have another shape than the configuration says.
        """
        with quiet():
            model_class, config = self.model_class()
        return load_model(model_class, config, self.checkpoint, required=self.required, dtype=dtype)

    def required(self, key: str) -> bool:
        """Whether the parameter `key` of the model must come from the checkpoint."""
        return True

    @abstractmethod
    def model_class(self) -> tuple[Any, Any]:
        """transformers' model class and its configuration, the language model reduced to nothing."""

    @abstractmethod
    def dims(self, model: nn.Module) -> dict[Modality, int]:
        """Embedding width per modality."""

    @abstractmethod
    def forward(
        self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device
    ) -> list[torch.Tensor]:
        """Encode a batch: one [tokens, dim] tensor per item, on `device`."""

    class_token = False
    """Whether the first row of an item is that of a class token."""

    def pooled_dims(self, model: nn.Module) -> dict[Modality, int]:
        """Width of the one vector that the model itself makes for an item; modalities without such a vector are left
        out."""
        return {}

    def pooled(self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device) -> list[torch.Tensor]:
        """That vector of each item of a batch: one [1, width] tensor per item, on `device`."""
        raise NotImplementedError

    # What preparers call. `options` are keyword arguments for the checkpoint's own processor.

    def load_processor(self, modality: Modality) -> Any:
        """The image processor, video processor or feature extractor of the checkpoint.

        Raises:
            StartupError: it is missing or unreadable.
        """
        return load_part(self.checkpoint, modality)

    def sampling(self, processor: Any) -> dict[str, Any] | None:
        """Arguments that a video processor passes to its own `sample_frames`; None for the common ones."""
        return None

    def sizes_freely(self, processor: Any) -> bool:
        """Whether `min_pixels` and `max_pixels` mean something: false where the processor alone
        chooses the size of images."""
        return True

    def prepare_image(self, processor: Any, image: Image.Image, options: Mapping[str, Any]) -> Prepared:
        """One RGB image, through the checkpoint's image processor."""
        raise NotImplementedError

    def prepare_video(
        self, processor: Any, frames: npt.NDArray[np.uint8], metadata: Any, options: Mapping[str, Any]
    ) -> Prepared:
        """Chosen frames [n, height, width, 3], through the checkpoint's video processor.

        `metadata`: transformers' VideoMetadata, with the frames' indices in the whole video.
        """
        raise NotImplementedError

    def split(self, prepared: Prepared, max_cost: int) -> list[Prepared]:
        """Pieces of an item that can be encoded apart, their embeddings put one after another, or the item alone.

        Each costs at most `max_cost` where the architecture allows it. Tensors are views of the item's.
        """
        return [prepared]

    def prepare_audio(self, extractor: Any, samples: npt.NDArray[np.float32]) -> Prepared:
        """Mono samples at the extractor's rate, through the checkpoint's feature extractor."""
        raise NotImplementedError


def gather(items: Sequence[Item], name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The items' tensors called `name`, concatenated along dim 0 on `device` in `dtype`."""
    parts = [item[name].to(device, non_blocking=True) for item in items]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def stack(items: Sequence[Item], name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The items' tensors called `name`, all of one shape, as one batch."""
    parts = [item[name].to(device, non_blocking=True) for item in items]
    return (parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)).to(dtype)


def without_language_model(config: Any) -> Any:
    """`config` with a text part that has no layers and one token, so that building the model costs nothing for it."""
    text = config.text_config
    text.num_hidden_layers = 0
    text.layer_types = []
    text.vocab_size = 1
    text.pad_token_id = None
    return config
