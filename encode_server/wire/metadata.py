"""What an engine that has an item's embedding needs of the item in place of the media, by vLLM's names.

vLLM sizes an item's place in the prompt by these fields. Its models declare them as `metadata` in `embedding_fields` of
their `MultiModalDataParser`. A model that declares more than the encoder knows is not listed: its media go to the
engine.
"""

from __future__ import annotations

from collections.abc import Mapping

from encode_server.wire.modality import Modality

Metadata = dict[str, list[int | float]]

_QWEN3_VL = frozenset({"qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"})
_GRID_SIZES_IMAGES = _QWEN3_VL | {"qwen2_vl", "qwen2_5_vl"}


def metadata_of(
    model_type: str,
    modality: Modality,
    grid_thw: list[int] | None,
    extra: Mapping[str, float | int | list[float]],
) -> Metadata | None:
    """The fields of one item, None where they are not known. `grid_thw`: [t, h, w] in patches. `extra`: as in
    `Prepared`.

    A video of Qwen2.5-VL is not among them: vLLM reads the seconds of a temporal patch from the media alone, and would
    place the video's tokens at other times without them.
    """
    if grid_thw is None:
        return None
    if modality is Modality.IMAGE and model_type in _GRID_SIZES_IMAGES:
        return {"image_grid_thw": [*grid_thw]}
    timestamps = extra.get("video_timestamps")
    if modality is Modality.VIDEO and model_type in _QWEN3_VL and isinstance(timestamps, list):
        return {"video_grid_thw": [*grid_thw], "timestamps": [*timestamps]}
    return None
