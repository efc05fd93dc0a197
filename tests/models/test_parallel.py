"""Tensor parallelism: the same embeddings from ranks that each hold their part of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from encode_server.errors import StartupError
from encode_server.media.limits import MediaLimits
from encode_server.models.encoder import load_encoder
from encode_server.models.parallel import cut, shard
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import resolve
from encode_server.models.structure import Block
from encode_server.pipeline.pooling import pooled
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality
from encode_server.wire.pools import POOLED, Pool
from tests.checkpoints import Checkpoints
from tests.models import samples
from tests.models.ranks import Jobs, encode_with_ranks

ALL = [
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen2_5_vl_wide",
    "qwen3_vl",
    "qwen2_5_omni_thinker",
    "qwen2_audio",
    "whisper",
    "siglip",
    "siglip2",
    "clip",
    "dinov2",
]
VECTORS = {"siglip", "siglip2", "clip", "dinov2"}
"""Models that make a vector of their own for an item, with weights that only the vector needs."""
MEDIA = {
    Modality.IMAGE: [samples.png(140, 260), samples.png(90, 90, seed=1)],
    Modality.VIDEO: [samples.clip(5, 64, 100)],
    Modality.AUDIO: [samples.wav(1.1), samples.wav(0.5, seed=1)],
}


def _jobs(checkpoints: Checkpoints, names: list[str]) -> Jobs:
    jobs = {}
    for name in names:
        path = checkpoints.path(name)
        preprocessor = Preprocessor(resolve(str(path)), MediaLimits())
        jobs[name] = (
            path,
            {
                modality: [
                    preprocessor.prepare(modality, data, ItemOptions(pool=pool)).tensors
                    for pool in ((None, Pool.MODEL) if name in VECTORS else (None,))
                    for data in MEDIA[modality]
                ]
                for modality in preprocessor.modalities
            },
        )
    return jobs


@pytest.mark.parametrize(
    ("world", "names"),
    [(2, ALL), pytest.param(4, ["qwen2_5_omni_thinker"], marks=pytest.mark.slow)],
    ids=["tp2-all", "tp4-omni"],
)
def test_ranks_agree_with_a_single_process(
    checkpoints: Checkpoints, tmp_path: Path, world: int, names: list[str]
) -> None:
    jobs = _jobs(checkpoints, names)
    ranks = encode_with_ranks(jobs, world, tmp_path)
    for name, (path, batches) in jobs.items():
        whole = load_encoder(str(path), device="cpu", dtype="float32", rank=0, world=1)
        for modality, items in batches.items():
            assert any(POOLED in item for item in items) == (name in VECTORS)
            for index, want in enumerate(whole.forward(modality, items)):
                assert (want.shape[0] == 1) == (POOLED in items[index])
                for outputs in ranks:
                    got = outputs[f"{name}/{modality}/{index}"]
                    torch.testing.assert_close(got, want, atol=1e-4, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
                    for pool in (Pool.MEAN, Pool.CLS):
                        vectors = [_pooled(rows, pool) for rows in (got, want)]
                        torch.testing.assert_close(*vectors, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_that_compute_as_on_a_gpu_agree_with_one_that_does_not(
    checkpoints: Checkpoints, tmp_path: Path, world: int
) -> None:
    """Widths filled up, gate and up of an MLP in one product, norms and GELU as a GPU likes them."""
    jobs = _jobs(checkpoints, ["qwen2_5_vl", "qwen3_vl"])
    ranks = encode_with_ranks(jobs, world, tmp_path, like_a_gpu=True)
    for name, (path, batches) in jobs.items():
        whole = load_encoder(str(path), device="cpu", dtype="float32")
        for modality, items in batches.items():
            for index, want in enumerate(whole.forward(modality, items)):
                for outputs in ranks:
                    got = outputs[f"{name}/{modality}/{index}"]
                    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def _pooled(rows: torch.Tensor, pool: Pool) -> torch.Tensor:
    """What the front makes of the rows that a rank gave."""
    vector = pooled(memoryview(rows.numpy().tobytes()), "float32", rows.shape[1], pool)
    return torch.frombuffer(bytearray(vector), dtype=torch.float32)


@pytest.mark.parametrize("name", ALL)
def test_ranks_together_hold_each_sharded_weight_once(checkpoints: Checkpoints, name: str) -> None:
    """Rank weights add up to the whole plus the replicated parts, which every rank holds."""
    path = str(checkpoints.path(name))
    whole = load_encoder(path, device="cpu", dtype="float32", rank=0, world=1).info.weight_bytes
    parts = [load_encoder(path, device="cpu", dtype="float32", rank=rank, world=2).info.weight_bytes for rank in (0, 1)]
    replicated = sum(parts) - whole
    assert 0 < replicated < 0.6 * whole  # patch and position embeddings weigh much in towers this small
    for part in parts:
        # MLP widths that 2 doesn't divide may leave one row's difference
        assert abs(part - (replicated + (whole - replicated) / 2)) < 0.01 * whole


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_full_size_tower_is_divided_by_the_number_of_ranks(world: int) -> None:
    """Qwen2.5-VL-7B's tower, without memory behind it; 8 does not divide its MLP width of 3420."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    config = Qwen2_5_VLVisionConfig(depth=32, hidden_size=1280, num_heads=16, intermediate_size=3420)

    def tower() -> Any:
        with torch.device("meta"):
            return nn.ModuleDict({"visual": Qwen2_5_VisionTransformerPretrainedModel(config)})

    whole = _bytes(tower())
    for rank in range(world):
        model = tower()
        shard(model, rank=rank, world=world)
        assert 1 / world < _bytes(model) / whole < 1 / world + 0.01


def test_fused_qkv_keeps_whole_heads_of_each_part() -> None:
    """Rows are numbered, so that what a rank keeps can be read off: 4 heads of 2 rows in each of q, k and v."""
    qkv = nn.Linear(1, 24)
    qkv.weight.data = torch.arange(24.0)[:, None]
    qkv.bias.data = 100 + torch.arange(24.0)
    holder = nn.ModuleDict({"qkv": qkv, "proj": nn.Linear(8, 1)})
    cut(holder, [Block("", "Attention", ("qkv",), "proj", ((8, 8, 8),))], rank=1, world=2)
    assert holder["qkv"].weight.flatten().tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]
    assert holder["qkv"].bias.tolist() == [104, 105, 106, 107, 112, 113, 114, 115, 120, 121, 122, 123]


def test_heads_that_cannot_be_divided_are_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(StartupError, match="tp 3 does not divide the 4 attention heads of the vision tower"):
        load_encoder(str(checkpoints.path("qwen2_5_vl")), device="cpu", dtype="float32", rank=0, world=3)


def _bytes(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters())
