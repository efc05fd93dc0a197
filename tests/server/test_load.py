"""What a server tells those who choose among servers, and what it does for one who may try elsewhere."""

from __future__ import annotations

import asyncio
import re

import httpx
import pytest

from encode_server.client import EmbeddingReceiver, EncodeClient, EncodeServerError
from encode_server.wire.load import load_from


def test_answers_health_and_metrics_say_how_much_work_there_is(server, picture):
    async def scenario():
        async with EncodeClient(server.base_url) as client:
            seen = []
            client.on_answer = seen.append
            for data in (picture(56, 56, 300), picture(112, 112, 301), picture(56, 56, 300)):
                await client.encode([data], "image")
            return seen, await client.health()

    (small, large, again, _), health = asyncio.run(scenario())
    load = load_from(small)
    assert load is not None and load.backlog_s >= 0 and (load.capacity is None or load.capacity > 0)
    assert int(large["X-Encode-Item-Tokens"]) == 4 * int(small["X-Encode-Item-Tokens"]) > 0
    assert again["X-Encode-Item-Tokens"] == "0", "the cache had it"
    assert health.document["backlog_seconds"] >= 0 and "capacity" in health.document
    text = httpx.get(server.base_url + "/metrics").text
    assert re.search(r"^encode_backlog_seconds [0-9]", text, re.MULTILINE)
    assert re.search(r"^encode_capacity_tokens_per_second [0-9]", text, re.MULTILINE)


def test_an_embedding_can_stay_in_the_cache_for_a_later_request(server, picture):
    async def scenario():
        async with EncodeClient(server.base_url) as client:
            warmed = await client.warm([picture(84, 56, 320), picture(56, 56, 321)], "image")
            later = await client.encode([picture(84, 56, 320)], "image")
            return warmed, later

    warmed, later = asyncio.run(scenario())
    assert [item.cached for item in warmed.items] == [False, False] and later.items[0].cached
    assert warmed.items[0].tokens == later.shape[0] and warmed.shape[1] == later.shape[1]
    mixed = {"mm_items": ["AAAA"], "modality": "image", "delivery": "cache", "prefill_host": "h", "embedding_port": 1}
    assert httpx.post(server.base_url + "/encode", json=mixed).status_code == 400


def test_an_error_can_be_kept_from_the_destination(server):
    """The caller may try another server: a receiver that was told of an error would have given up."""

    async def scenario():
        async with EmbeddingReceiver() as receiver:
            body = {"mm_items": ["AAAA"], "modality": "image", "prefill_host": receiver.host}
            body |= {"embedding_port": receiver.port}
            quiet, told = body | {"req_id": "quiet"}, body | {"req_id": "told"}
            async with httpx.AsyncClient(base_url=server.base_url) as http:
                for document, headers in ((quiet, {"X-Encode-Errors": "answer"}), (told, {})):
                    assert (await http.post("/encode", json=document, headers=headers)).status_code == 400
            with pytest.raises(EncodeServerError, match="bad_media"):
                await receiver.receive("told", timeout=20)
            with pytest.raises(TimeoutError, match="nothing came"):
                await receiver.receive("quiet", timeout=0.2)

    asyncio.run(scenario())
