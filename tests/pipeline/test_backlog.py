"""How many seconds of work the batcher says it has."""

from __future__ import annotations

import asyncio
import time

import pytest

from encode_server.pipeline.cost import ForwardCost
from encode_server.pipeline.fair_queue import FairQueue
from encode_server.pipeline.jobs import Job, Piece
from encode_server.wire.modality import Modality


def test_the_rate_leaves_out_what_every_batch_costs():
    cost = ForwardCost()
    for batch in range(1, 17):  # 10 ms, and a millisecond for 100 patches
        cost.observe(100 * batch, 0, 0.010 + 0.001 * batch)
    assert cost.patches_per_s == pytest.approx(100_000, rel=0.01)


def test_batches_of_one_size_teach_no_rate():
    cost = ForwardCost()
    for _ in range(16):
        cost.observe(256, 65536, 0.02)
    assert cost.patches_per_s is None


def test_the_queue_knows_its_work_whatever_way_a_piece_leaves():
    async def scenario():
        queue = FairQueue()
        jobs = []
        for client in ("a", "b"):
            for _ in range(3):
                job = Job(None, Modality.IMAGE, time.monotonic() + 60, client=client)
                job.pieces = (Piece(job, None, 100, 50), Piece(job, None, 10, 5))
                queue.put(job)
                jobs.append(job)
        assert (queue.work[Modality.IMAGE].patches, queue.work[Modality.IMAGE].pairs) == (660, 330)
        taken = queue.take({Modality.IMAGE: 250}, lambda job: True)
        left = 660 - sum(piece.cost for piece in taken)
        assert queue.work[Modality.IMAGE].patches == left > 0
        dead = jobs[-1]
        while queue.take({Modality.IMAGE: 1000}, lambda job: job is not dead):
            pass
        assert queue.work[Modality.IMAGE].patches == queue.work[Modality.IMAGE].pairs == 0

    asyncio.run(scenario())
