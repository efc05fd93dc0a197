"""The backlog in seconds: what waits for a batch, by the speed that recent forwards had."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from encode_server.pipeline.batcher import Batcher
from encode_server.pipeline.cost import ForwardCost
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.modality import Modality


def job(modality: Modality, *costs: int) -> SimpleNamespace:
    made = SimpleNamespace(modality=modality, client="a", reserved=False)
    made.pieces = [SimpleNamespace(job=made, cost=cost, pairs=0) for cost in costs]
    return made


@pytest.mark.parametrize("side_by_side", [1, 2])
def test_it_is_what_waits_over_the_speed_of_each_modality(side_by_side):
    async def look() -> None:
        engine = SimpleNamespace(info=SimpleNamespace(at_once=side_by_side, batch_cost=0), ready=False)
        batcher = Batcher(engine, dict.fromkeys(Modality, 1000), Metrics())
        batcher.submit(job(Modality.IMAGE, 300, 300))
        assert batcher.backlog_s == 0  # nothing is known yet
        batcher.costs[Modality.IMAGE].observe(100, 0, 0.5)
        batcher.costs[Modality.AUDIO].observe(1000, 0, 0.5)
        assert batcher.backlog_s == pytest.approx(600 / 200 / side_by_side)
        batcher.submit(job(Modality.AUDIO, 4000))
        assert batcher.backlog_s == pytest.approx((600 / 200 + 4000 / 2000) / side_by_side)

    asyncio.run(look())


def test_the_speed_follows_the_device():
    cost = ForwardCost()
    assert cost.patches_per_second == 0
    for _ in range(200):
        cost.observe(100, 0, 1.0)
    for _ in range(200):
        cost.observe(100, 0, 0.1)
    assert cost.patches_per_second == pytest.approx(1000)
