"""How many kernels a layer takes, counted on towers of released widths, and the same collectives on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.card.count import BEFORE, count, per_layer
from benchmarks.card.device import emulated
from benchmarks.card.ledger import Kind
from benchmarks.roofline import batch, released
from benchmarks.towers import FULL_SIZE
from encode_server.models.encoder import load_encoder
from encode_server.models.speedups import Speedup
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints
from tests.cuda.ward import batches

BUDGET = {"Qwen2.5-VL-7B": (40, 15, 11), "Qwen3-VL-8B": (24, 13, 10)}
"""Kernels of a layer: as transformers computes it, without Triton, with Triton."""


@pytest.mark.parametrize("name", BUDGET)
def test_a_layer_keeps_its_budget_of_launches(tmp_path: Path, name: str) -> None:
    small, large = (
        released(tmp_path / str(depth), {name: replace(FULL_SIZE[name], depth=depth, deepstack=(0,), full=(0,))})[name]
        for depth in (2, 4)
    )
    items = batch(small, 224, alone=True)

    def counted(**how: Any) -> float:
        found = [count(directory, Modality.IMAGE, items, **how) for directory in (small, large)]
        return per_layer(*found, layers=2)

    everything = frozenset(Speedup)
    assert (counted(speedups=BEFORE), counted(triton=False), counted(speedups=everything)) == BUDGET[name]


@contextmanager
def _only(rank: int, world: int) -> Iterator[None]:
    """A group of `world` ranks of which this one alone exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


NAMES = ["qwen2_5_vl", "qwen3_vl", "qwen2_5_omni_thinker", "qwen2_audio", "whisper", "siglip", "clip", "dinov2"]


@pytest.mark.parametrize(
    ("name", "world"),
    [
        ("qwen2_5_vl", 2),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in NAMES if name != "qwen2_5_vl"),
        *(pytest.param(name, 4, marks=pytest.mark.slow) for name in NAMES),
    ],
)
def test_every_rank_makes_the_same_collectives(checkpoints: Checkpoints, name: str, world: int) -> None:
    path = checkpoints.path(name)
    for modality, items in batches(path).items():
        ranks = []
        for rank in range(world):
            with _only(rank, world), emulated(values=False) as device:
                encoder = load_encoder(str(path), device="cuda:0", dtype="bfloat16", rank=rank, world=world)
                device.ledger.clear()
                encoder.forward(modality, items)
                ranks.append([(one.name, one.shape) for one in device.ledger.of(Kind.COLLECTIVE)])
        assert ranks[0] and all(one == ranks[0] for one in ranks)


@pytest.mark.parametrize("world", [8, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 4))])
def test_a_layer_of_a_tower_of_released_size_makes_two_collectives(tmp_path: Path, world: int) -> None:
    tower = replace(FULL_SIZE["Qwen2.5-VL-7B"], depth=2, full=(1,))
    directory = released(tmp_path, {"shallow": tower})["shallow"]
    items = batch(directory, 224, alone=True)
    ranks = []
    for rank in (0, world - 1):
        with _only(rank, world):
            launches = count(directory, Modality.IMAGE, items, rank=rank, world=world)
        ranks.append([one.shape for one in launches if one.kind is Kind.COLLECTIVE])
    assert ranks[0] == ranks[1] == [(256, 1280)] * 4 + [(64, 3584)]
