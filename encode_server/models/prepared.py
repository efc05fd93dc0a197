"""What preprocessing makes of one media item."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prepared:
    """One item, ready for the ranks.

    `tensors`: contiguous CPU tensors by name, what the encoder's forward of this modality takes for one item.
    `tokens`: rows of its embedding. `cost`: patches or mel frames, the unit of the batch's token budget.
    `pairs`: patches that attend to each other in a layer of full attention, counted as pairs; 0 where all items are
    alike, so that it makes no difference. `grid_thw`: (t, h, w) in patches, None where there is no such grid.
    `extra`: what an engine wants beside the embedding (`video_timestamps`, `second_per_grid_ts`, `mel_frames`, …).
    """

    tensors: dict[str, torch.Tensor]
    tokens: int
    cost: int
    pairs: int = 0
    grid_thw: tuple[int, int, int] | None = None
    extra: dict[str, float | int | list[float]] = field(default_factory=dict)
