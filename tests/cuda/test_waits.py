"""Families without rules of their own make the host wait where transformers' code does, and nowhere else."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.card.device import emulated
from encode_server.models.encoder import load_encoder
from encode_server.models.inspect import inspect
from encode_server.wire.modality import Modality
from tests.cuda.ward import batches, on_a_cpu, relative_error
from tests.models.families.builders import write

_GRIDS = {
    "transformers/vision_utils.py:get_vision_position_ids",
    "transformers/vision_utils.py:get_vision_cu_seqlens",
    "transformers/utils/generic.py:get_max_seqlen",
    "encode_server/models/attention.py:layout_of",
}
WAITS = {
    "llava": set(),
    "internvl": set(),
    "glm4v": _GRIDS | {"transformers/models/glm4v/modeling_glm4v.py:get_image_features"},
    "qwen3_5": _GRIDS
    | {
        "transformers/vision_utils.py:get_vision_interpolation_indices_and_weights",
        "transformers/models/qwen3_5/modeling_qwen3_5.py:get_image_features",
    },
    "qwen3_asr": {
        "transformers/models/qwen3_asr/modeling_qwen3_asr.py:get_audio_cu_seqlens",
        "transformers/models/qwen3_asr/modeling_qwen3_asr.py:forward",
        "transformers/utils/generic.py:get_max_seqlen",
        "encode_server/models/attention.py:layout_of",
    },
}
"""The functions that may make the host wait during a forward. A family of this server's own may not wait at all."""
SEGMENTS = {"qwen3_asr": 3}
"""Attention segments of the batch where they are not the items: a layout reads the length of each of them."""


@pytest.mark.slow
@pytest.mark.parametrize("name", WAITS)
def test_the_host_waits_in_known_functions_alone(tmp_path: Path, name: str) -> None:
    path = write(name, tmp_path / name)
    facts = inspect((str(path), None, 1)).facts
    modality = Modality.AUDIO if name == "qwen3_asr" else Modality.IMAGE
    items = batches(path)[modality]
    with emulated() as device:
        encoder = load_encoder(str(path), device="cuda:0", dtype="bfloat16", facts=facts)
        device.ledger.clear()
        embeddings = encoder.forward(modality, items)
        waits = Counter(wait.place for wait in device.ledger.waits)
        got = [rows.cpu() for rows in embeddings]
    assert relative_error(got, on_a_cpu(path, modality, items)) < 0.02
    assert set(waits) <= WAITS[name]
    assert waits["encode_server/models/attention.py:layout_of"] <= SEGMENTS.get(name, len(items)), (
        "a wait in every layer"
    )
