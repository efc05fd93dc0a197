"""An encoder dies under load. The last file of its folder: whoever comes next pays for a new server."""

from __future__ import annotations

import asyncio
import os
import signal

from encode_server.client import EmbeddingReceiver, EncoderPool
from tests.models.samples import png


def test_every_part_comes_once_though_an_encoder_is_killed_on_the_way(fleet):
    pictures = [[png(160, 160 + 32 * (i % 3), 2000 + 2 * i + k) for k in range(2)] for i in range(60)]

    async def encode():
        async with EmbeddingReceiver() as receiver:
            async with EncoderPool(fleet.urls, receiver=receiver, timeout=90) as pool:
                first = [asyncio.create_task(pool.encode(two, "image")) for two in pictures[:30]]
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
                os.kill(fleet.b.front_pid(), signal.SIGKILL)
                # The first may all have been answered by now; of the others half belong to the one that is gone.
                others = [asyncio.create_task(pool.encode(two, "image")) for two in pictures[30:]]
                results = await asyncio.gather(*first, *others)
                state = {e.url: e.healthy for e in pool.encoders}
                assert all(e.in_flight == 0 for e in pool.encoders)
            assert not receiver._waiting
            return results, state

    results, state = asyncio.run(encode())
    fleet.b.process.wait(10)
    assert state == {fleet.a.base_url: True, fleet.b.base_url: False}
    for (first, second), embedding in zip(pictures, results, strict=True):
        assert len({first, second}) == len(embedding.items) == 2
        assert embedding.shape == (sum(item.tokens for item in embedding.items), 144)
