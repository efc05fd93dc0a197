"""The pool against real encoders, and the documented example scheduler."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from encode_server.client import EmbeddingReceiver, EncodeClient, EncoderPool, EncodeServerError, Item
from tests.live import eventually
from tests.models.samples import png

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "scheduler.py"


def test_rows_come_in_the_order_of_the_media_whoever_encoded_them(fleet):
    pictures = [png(64, 64 + 32 * (i % 4), 50 + i) for i in range(12)]

    async def compare(pushed: bool):
        async with EmbeddingReceiver() as receiver, EncodeClient(fleet.a.base_url) as one:
            async with EncoderPool(fleet.urls, receiver=receiver if pushed else None) as pool:
                spread, alone = await pool.encode(pictures, "image", req_id="r"), await one.encode(pictures, "image")
            assert receiver.rejected == receiver.duplicates == 0
            return spread, alone

    for pushed in (False, True):
        spread, alone = asyncio.run(compare(pushed))
        assert [i.tokens for i in spread.items] == [i.tokens for i in alone.items] and spread.req_id == "r"
        assert np.abs(spread.numpy() - alone.numpy()).max() <= 1e-4


def test_the_same_media_goes_to_the_same_encoder(fleet):
    async def twice():
        """One after another: media leave an owner that has much to do."""
        async with EncoderPool(fleet.urls) as pool:
            media = [[png(64, 64, 80 + i)] for i in range(8)]
            for item in media:
                await pool.encode(item, "image")
            return [await pool.encode(item, "image") for item in reversed(media)]

    assert all(embedding.items[0].cached for embedding in asyncio.run(twice()))


def test_a_bad_item_fails_at_once_and_is_not_tried_elsewhere(fleet):
    async def bad():
        async with EncoderPool(fleet.urls) as pool:
            with pytest.raises(EncodeServerError) as caught:
                await pool.encode([png(64, 64, 90), b"no picture"], "image")
            return caught.value, pool.encoders

    error, encoders = asyncio.run(bad())
    assert error.status == 400 and all(e.healthy and e.in_flight == 0 for e in encoders)


def test_cancelling_leaves_nothing_behind(fleet):
    async def cancel():
        async with EmbeddingReceiver() as receiver, EncoderPool(fleet.urls, receiver=receiver) as pool:
            calls = [asyncio.create_task(pool.encode([png(256, 256, 1000 + i)], "image")) for i in range(10)]
            while not any(e.in_flight for e in pool.encoders):  # noqa: ASYNC110 - it is on its way to another process
                await asyncio.sleep(0.005)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            assert all(e.in_flight == 0 for e in pool.encoders)
            assert len(asyncio.all_tasks()) <= 8, "this one, the receiver's, the pool's and its probes"
            for client in (fleet.a, fleet.b):
                assert await asyncio.to_thread(idle, client.base_url)
            return receiver._waiting, len(receiver._early)

    assert asyncio.run(cancel()) == ({}, 0)


def idle(url: str) -> bool:
    return eventually(lambda: "\nencode_requests_in_progress 0.0\n" in httpx.get(url + "/metrics", timeout=60).text)


def test_stored_items_answer_in_order(fleet):
    async def store():
        async with EncoderPool(fleet.urls, choice="least_loaded") as pool:
            items = [Item(png(64, 64 + 32 * i, 95 + i), uuid=f"pool-{i}") for i in range(4)]
            return await pool.store(items, "image")

    assert [info.tokens for info in asyncio.run(store())] == [4, 6, 8, 10]
    assert all(fleet.entry(f"pool-{i}").exists() for i in range(4))


def test_the_example_scheduler_runs(fleet, tmp_path):
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(64, 64, 99))
    done = subprocess.run([sys.executable, EXAMPLE, picture, *fleet.urls], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shapes = {"request-0": (4, 144), "request-1": (8, 144), "request-2": (12, 144)}
    assert ast.literal_eval(done.stdout.strip()) == shapes
    assert len(EXAMPLE.read_text().splitlines()) <= 45
