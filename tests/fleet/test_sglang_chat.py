"""The proxy before a prefill's chat API: media are encoded first, and what cannot be decoded reaches no prefill."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from encode_server.client import EncodeClient
from tests.fleet.engine_standin import EngineStandIn, served
from tests.fleet.test_route import chat, data_uri, image, router
from tests.models.samples import png


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    stand_in = EngineStandIn(tmp_path_factory.mktemp("none"))
    with served(stand_in.app()) as stand_in.url:
        yield stand_in


@pytest.fixture(scope="module")
def route(_fleet, engine, tmp_path_factory):
    tmp, urls = tmp_path_factory.mktemp("route"), _fleet.whole().urls
    with router(tmp, engine.url, urls, "--protocol", "sglang") as live:
        yield live.listening().base_url


def post(route: str, body: object) -> httpx.Response:
    return httpx.post(route + "/v1/chat/completions", json=body, timeout=60)


def test_the_encoder_that_sglang_will_be_sent_to_has_the_image_already(fleet, engine, route):
    pictures = [png(64, 64, 200 + seed) for seed in range(4)]
    body = chat(*map(image, pictures))
    assert post(route, body).status_code == 200
    assert engine.seen[-1] == body, "the request is not touched"

    async def ask():
        # As the prefill asks: one part, to the proxy; here for the embedding itself, which the answer holds.
        async with EncodeClient(route) as client:
            return await client.encode_json([data_uri(data) for data in pictures], "image", req_id="p")

    assert all(item.cached for item in asyncio.run(ask()).items)


def test_broken_media_is_answered_to_its_user_and_reaches_no_prefill(fleet, engine, route):
    before = len(engine.seen)
    answer = post(route, chat(image(png(64, 64, 210)), image(png(64, 64, 211)[:100])))
    error = answer.json()["error"]
    assert answer.status_code == 400 == error["code"] and "mm_items[" in error["message"]
    assert len(engine.seen) == before
    assert post(route, chat(image(png(64, 64, 210)))).status_code == 200
