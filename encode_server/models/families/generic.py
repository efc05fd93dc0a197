"""Any family that has no rules of its own, encoded as its inspection found right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from encode_server.models.checkpoint import Checkpoint
from encode_server.models.families.base import Family, Item
from encode_server.models.generic.classes import find_class
from encode_server.models.generic.describe import describe
from encode_server.models.generic.features import Features
from encode_server.models.generic.media import MediaProcessor, video_options
from encode_server.models.generic.skeleton import stripped
from encode_server.models.prepared import Prepared
from encode_server.models.speedups import Speedup
from encode_server.wire.checkpoint import Facts
from encode_server.wire.modality import Modality

_LEAST_SECONDS = (0.0, 0.1, 0.5, 1.0)
"""Audio too short for a single token is followed by silence up to the first of these lengths that gives one."""


class Generic(Family):
    """`facts`: what the inspection found; ranks need them, preparers don't."""

    facts: Facts | None = None

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.found = find_class(checkpoint)

    @cached_property
    def media(self) -> MediaProcessor:
        """The checkpoint's processor, loaded when it is first asked for."""
        return MediaProcessor(self.checkpoint, self.found)

    @property
    def modalities(self) -> frozenset[Modality]:
        return frozenset(
            modality
            for modality in Modality
            if self.found.features_method(modality) is not None and self.media.part(modality) is not None
        )

    @property
    def speedups(self) -> frozenset[Speedup]:
        return frozenset(map(Speedup, self._facts.speedups))

    @property
    def whole(self) -> frozenset[str]:
        return frozenset(self._facts.whole)

    @property
    def _facts(self) -> Facts:
        assert self.facts is not None
        return self.facts

    def model_class(self) -> tuple[Any, Any]:
        return stripped(self.found, self.facts.left_out if self.facts is not None else ()), self.found.config

    def dims(self, model: nn.Module) -> dict[Modality, int]:
        return {modality: facts.dim for modality, facts in self._facts.modalities.items()}

    def forward(
        self, model: Any, modality: Modality, items: Sequence[Item], device: torch.device
    ) -> list[torch.Tensor]:
        facts = self._facts.modalities[modality]
        return Features(model, self.found, modality).run(items, facts, device)

    def load_processor(self, modality: Modality) -> Any:
        return self.media.part(modality)

    def sampling(self, processor: Any) -> dict[str, Any]:
        # As the processor's own `preprocess` calls `sample_frames`.
        return {name: getattr(processor, name, None) for name in processor.valid_kwargs.__annotations__}

    def sizes_freely(self, processor: Any) -> bool:
        size = getattr(processor, "size", None) or {}
        bounds = all(size.get(name) for name in ("shortest_edge", "longest_edge"))
        return bounds and all(hasattr(processor, name) for name in ("patch_size", "merge_size"))

    def prepare_image(self, processor: Any, image: Image.Image, options: Mapping[str, Any]) -> Prepared:
        return describe(self.media(Modality.IMAGE, image, options), Modality.IMAGE, processor)

    def prepare_video(
        self, processor: Any, frames: npt.NDArray[np.uint8], metadata: Any, options: Mapping[str, Any]
    ) -> Prepared:
        processed = self.media(Modality.VIDEO, frames, {**video_options(metadata), **options})
        prepared = describe(processed, Modality.VIDEO, processor)
        prepared.extra["frame_seconds"] = [index / metadata.fps for index in metadata.frames_indices]
        return prepared

    def prepare_audio(self, extractor: Any, samples: npt.NDArray[np.float32]) -> Prepared:
        for seconds in _LEAST_SECONDS:
            missing = max(0, round(seconds * extractor.sampling_rate) - len(samples))
            if seconds and not missing:
                continue  # tried already
            try:
                processed = self.media(Modality.AUDIO, np.pad(samples, (0, missing)), {})
            except ValueError as error:
                failure = error
                continue
            return describe(processed, Modality.AUDIO, extractor)
        raise failure
