"""What an item of a family without rules of its own is said to cost."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from encode_server.models.generic.describe import describe
from encode_server.models.generic.media import Processed
from encode_server.wire.modality import Modality


def test_an_image_without_pixels_costs_its_tokens() -> None:
    """Some processors name their tensors in other ways than `pixel_values`."""
    tensors = {"image_patches": torch.zeros(1, 7, 12)}
    processed = Processed(tensors, 5, 4, {}, frozenset(tensors))
    prepared = describe(processed, Modality.IMAGE, SimpleNamespace())
    assert (prepared.tokens, prepared.cost) == (5, 5)
    assert set(prepared.tensors) == {"image_patches", "tokens"}
