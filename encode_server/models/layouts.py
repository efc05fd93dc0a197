"""Where the patches of a packed vision batch lie: positions, attention segments, windows.

transformers computes these from the grids in every forward; here each grid is computed once, by transformers' own
functions, kept in a small cache, and the batch is put together from the pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from encode_server.models.attention import Segments
from encode_server.models.transfer import to_device

Grid = tuple[int, int, int]
"""(t, h, w) of one item, in patches."""

_GRIDS = 64
"""How many grids' layouts a tower remembers."""


@dataclass(frozen=True)
class GridLayout:
    """One item's layout. `positions`: int64 [patches, 2]. `frames`, `windows`: lengths of attention segments, in
    patches. `window_index`: int64 [tokens]. `interpolation`: indices and weights [patches, 4] into position embeddings.
    """

    positions: torch.Tensor
    frames: tuple[int, ...]
    windows: tuple[int, ...] = ()
    window_index: torch.Tensor | None = None
    interpolation: tuple[torch.Tensor, torch.Tensor] | None = None


class VisionLayouts:
    """Layouts of a Qwen vision tower's batches, as keyword arguments for its forward."""

    def __init__(self, config: Any) -> None:
        """`config`: the vision tower's."""
        self._merge = int(config.spatial_merge_size)
        self._patch = int(config.patch_size)
        self._window = getattr(config, "window_size", None)
        table = getattr(config, "num_position_embeddings", None)
        self._table_side = int(table**0.5) if table else None
        self._grid = lru_cache(maxsize=_GRIDS)(self._compute)

    def batch(self, grids: Sequence[Grid], device: torch.device) -> dict[str, Any]:
        """What transformers would compute for these grids, under the names its vision models take it by."""
        layouts = [self._grid(grid) for grid in grids]
        frames = Segments([length for layout in layouts for length in layout.frames], device)
        arguments: dict[str, Any] = {
            "position_ids": _joined([layout.positions for layout in layouts], device),
            "cu_seqlens": frames.cu_seqlens,
            "max_seqlen": frames.longest,
            "segments": (frames,),
        }
        if self._window:
            windows = Segments([length for layout in layouts for length in layout.windows], device)
            arguments["window_index"] = _joined(self._shifted(layouts), device)
            arguments["cu_window_seqlens"] = windows.cu_seqlens
            arguments["max_window_seqlen"] = windows.longest
            arguments["segments"] = (frames, windows)
        pairs = [layout.interpolation for layout in layouts if layout.interpolation is not None]
        if pairs:
            arguments["interp_indices"] = _joined([indices for indices, _ in pairs], device)
            arguments["interp_weights"] = _joined([weights for _, weights in pairs], device)
        return arguments

    def _shifted(self, layouts: Sequence[GridLayout]) -> list[torch.Tensor]:
        """Each item's window index, counted from the start of the batch."""
        shifted, start = [], 0
        for layout in layouts:
            assert layout.window_index is not None
            shifted.append(layout.window_index + start)
            start += len(layout.window_index)
        return shifted

    def _compute(self, grid: Grid) -> GridLayout:
        from transformers import vision_utils

        t, h, w = grid
        grid_thw = torch.tensor([grid])
        positions = vision_utils.get_vision_position_ids(grid_thw, self._merge)
        frames = (h * w,) * t
        if self._window:
            index, bounds = vision_utils.get_vision_window_index(
                grid_thw, spatial_merge_size=self._merge, window_size=self._window, patch_size=self._patch
            )
            return GridLayout(positions, frames, tuple(bounds.diff().tolist()), index)
        if self._table_side:
            interpolation = vision_utils.get_vision_interpolation_indices_and_weights(
                grid_thw,
                num_grid_per_side=self._table_side,
                mode="bilinear",
                align_corners=True,
                spatial_merge_size=self._merge,
            )
            return GridLayout(positions, frames, interpolation=interpolation)
        return GridLayout(positions, frames)


def _joined(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return to_device(joined, device)
