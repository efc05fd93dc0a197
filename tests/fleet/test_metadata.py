"""The proxy before a vLLM with our connector: embeddings are pushed, and metadata go in the place of media."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import httpx
import pytest

from encode_server.client import EmbeddingReceiver
from tests.fleet.engine_standin import EngineStandIn, served
from tests.fleet.test_route import chat, data_uri, image, post, router
from tests.models.samples import clip, png


@pytest.fixture
def engine(tmp_path):
    stand_in = EngineStandIn(tmp_path)
    stand_in.go_on.set()
    with served(stand_in.app()) as stand_in.url:
        yield stand_in


def behind_route(fleet, engine, tmp_path, use: Callable[[str, EmbeddingReceiver], Awaitable[None]], *options) -> None:
    """`use(url, receiver)`, the URL that of a proxy whose engine receives there."""

    async def run() -> None:
        async with EmbeddingReceiver() as receiver:
            where = ("--engine-receives", f"127.0.0.1:{receiver.port}")
            with router(tmp_path / "route", engine.url, fleet.urls, *where, *options) as live:
                await use((await asyncio.to_thread(live.listening)).base_url, receiver)

    asyncio.run(run())


async def ask(url: str, body: object) -> httpx.Response:
    return await asyncio.to_thread(post, url, body)


def parts(engine: EngineStandIn) -> list[dict]:
    return engine.seen[-1]["messages"][0]["content"]


def counted(url: str, name: str) -> float:
    lines = httpx.get(url + "/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


VIDEO = {"type": "video_url", "video_url": {"url": data_uri(clip(8, 64, 64), "image/gif")}}


def test_metadata_take_the_place_of_media(fleet, engine, tmp_path):
    async def use(url: str, receiver: EmbeddingReceiver) -> None:
        body = chat(image(png(64, 64, 60)), image(png(64, 96, 61)), VIDEO, image(png(64, 64, 60)))
        # The same chat twice at the same time: nobody is told that the item is being pushed already.
        answers = await asyncio.gather(ask(url, body), ask(url, body))
        assert [answer.status_code for answer in answers] == [200, 200]
        one, two, video, again, text = parts(engine)
        assert one == again and text == {"type": "text", "text": "?"}
        assert one["type"] == "image_embeds" and one["image_embeds"] == {"image_grid_thw": [1, 4, 4]}
        assert two["image_embeds"] == {"image_grid_thw": [1, 4, 6]} and two["uuid"] != one["uuid"]
        assert video["type"] == "video_embeds" and set(video["video_embeds"]) == {"video_grid_thw", "timestamps"}
        assert len(video["video_embeds"]["timestamps"]) == video["video_embeds"]["video_grid_thw"][0]
        for part, tokens in ((one, 4), (two, 6)):
            assert (await receiver.receive(part["uuid"], timeout=10)).items[0].tokens == tokens
        tries = [seen for seen in engine.seen if seen.get("max_tokens") == 1]
        assert len(tries) == 1, "the engine is asked once whether it takes metadata"
        assert (await ask(url, chat(image(b"no image")))).status_code == 400
        assert counted(url, "route_media_total") == 8

    behind_route(fleet, engine, tmp_path, use)


@pytest.mark.parametrize("status", [400, 500])
def test_an_engine_that_takes_no_metadata_gets_the_media(fleet, engine, tmp_path, status):
    engine.metadata_status = status

    async def use(url: str, receiver: EmbeddingReceiver) -> None:
        body = chat(image(png(64, 64, 62)))
        for _ in range(2):
            assert (await ask(url, body)).status_code == 200
            assert parts(engine)[0]["type"] == "image_url"
        assert parts(engine)[0]["uuid"].startswith("es-"), "the second request's embedding is found"
        assert counted(url, "route_metadata_refused_total") == 1

    behind_route(fleet, engine, tmp_path, use)


def test_an_embedding_that_is_lost_later_brings_the_media_back(fleet, engine, tmp_path):
    async def use(url: str, receiver: EmbeddingReceiver) -> None:
        body = chat(image(png(64, 64, 63)))
        assert (await ask(url, body)).status_code == 200 and parts(engine)[0]["type"] == "image_embeds"
        engine.metadata_status = 500
        assert (await ask(url, body)).status_code == 200 and engine.seen[-1] == body

    behind_route(fleet, engine, tmp_path, use)


def test_a_large_request_keeps_what_is_not_replaced_and_its_media_for_the_way_back(fleet, engine, tmp_path):
    async def use(url: str, receiver: EmbeddingReceiver) -> None:
        long = {"type": "text", "text": "é" * (3 << 20)}
        body = chat(image(png(64, 64, 68)), VIDEO, long)
        assert (await ask(url, body)).status_code == 200
        assert [part["type"] for part in parts(engine)] == ["image_embeds", "video_url", "text", "text"]
        assert parts(engine)[1:] == body["messages"][0]["content"][1:]
        engine.metadata_status = 500
        assert (await ask(url, body)).status_code == 200 and engine.seen[-1] == body
        assert counted(url, "route_metadata_refused_total") == 1

    behind_route(fleet, engine, tmp_path, use, "--engine-renames", "video")


def test_media_may_be_told_to_go_along(fleet, engine, tmp_path):
    async def use(url: str, receiver: EmbeddingReceiver) -> None:
        body = chat(image(png(64, 64, 64)))
        assert (await ask(url, body)).status_code == 200
        name = parts(engine)[0].pop("uuid")
        assert engine.seen == [body] and (await receiver.receive(name, timeout=10)).items[0].tokens == 4

    behind_route(fleet, engine, tmp_path, use, "--forward-media", "always")


def test_an_engine_that_renames_is_found_out(fleet, engine, tmp_path):
    """vLLM hashes media_io_kwargs of its own together with the names, and finds nothing, without a word."""
    engine.calls = {"video": "another", "image": "another"}

    async def use(url: str, receiver: EmbeddingReceiver) -> None:
        body = chat(image(png(64, 64, 65)))
        for _ in range(2):
            assert (await ask(url, body)).status_code == 200
            assert engine.seen[-1] == body, "left to the engine"
        assert counted(url, 'route_engine_renames{modality="image"}') == 1
        assert counted(url, 'route_media_total{form="left"') == 2

    behind_route(fleet, engine, tmp_path, use)


def test_an_engine_that_renames_may_be_told(fleet, engine, tmp_path):
    async def use(url: str, receiver: EmbeddingReceiver) -> None:
        assert (await ask(url, chat(image(png(64, 64, 66)), VIDEO))).status_code == 200
        assert [part["type"] for part in parts(engine)] == ["image_embeds", "video_url", "text"]
        assert "uuid" not in parts(engine)[1]

    behind_route(fleet, engine, tmp_path, use, "--engine-renames", "video")


def test_responses_are_named_and_keep_their_media(fleet, engine, tmp_path):
    async def use(url: str, receiver: EmbeddingReceiver) -> None:
        part = {"type": "input_image", "image_url": data_uri(png(64, 64, 67)), "detail": "auto"}
        body = {"model": "m", "input": [{"role": "user", "content": [part]}]}
        assert (await asyncio.to_thread(post, url, body, path="/v1/responses")).status_code == 200
        name = engine.seen[-1]["input"][0]["content"][0].pop("uuid")
        assert engine.seen[-1] == body and (await receiver.receive(name, timeout=10)).items[0].tokens == 4
        plain = {"model": "m", "input": "hi"}
        assert (await asyncio.to_thread(post, url, plain, path="/v1/responses")).status_code == 200

    behind_route(fleet, engine, tmp_path, use)
