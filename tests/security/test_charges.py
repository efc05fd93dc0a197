"""Whatever grows is charged while it grows, and what has failed is gone."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest

from encode_server.delivery.undelivered import Undelivered
from encode_server.errors import BadMedia, TooBusy, TooLarge
from encode_server.pipeline.admission import Admission, AdmissionLimits
from encode_server.pipeline.request import EncodeRequest, MediaItem
from encode_server.runtime.tracebacks import let_go
from encode_server.runtime.turns import ClientTurns
from encode_server.service.caller import Ask
from encode_server.service.life import serve_encode
from encode_server.telemetry.history import History
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.modality import Modality
from tests.media.web_server import web_server
from tests.security.requests import encode, item

MIB = 1 << 20


@pytest.mark.parametrize(
    "fields",
    [
        {"mm_items": [{"url": "x", "uuid": "u" * 1_000_000}]},
        {"mm_items": [{"url": "x", "content_hash": "u" * 1_000_000}]},
        {"req_id": "r" * 1_000_000},
        {"prefill_host": "h" * 1_000_000, "embedding_port": 1},
        {"delivery": "d" * 1_000_000},
        {"prefill_host": "h", "embedding_port": list(range(1, 1000))},
        {"mm_items": [{"url": "x", "max_pixels": 10**400}]},
        {"part_idx": 2**65},
        {"num_parts": 2**65},
        {"embedding_port": 2**65, "prefill_host": "127.0.0.1"},
        {"timeout_s": 10**400},
        {"mm_items": [{"url": "x", "fps": 1e300}]},
        {"mm_items": [{"url": "file:///etc/%00passwd"}]},
    ],
)
def test_strings_and_numbers_have_bounds(server, fields):
    answer = encode(server, **fields)
    assert answer.status_code in (400, 403, 413), answer.text
    assert len(answer.content) < 2000


def test_downloads_are_charged_while_they_run():
    """Of ten downloads that stall at 20 MB each, those above the bound end at the bound."""
    from concurrent.futures import ThreadPoolExecutor

    from encode_server.media.limits import MediaLimits
    from encode_server.media.sources import MediaSource

    async def fetch(gate, source, url):
        with gate.admit(url, 0) as ticket:
            await source.fetch(url, ticket.grow)

    async def check():
        gate = Admission(AdmissionLimits(100, 50 * MIB, 1000, 1.0))
        with web_server() as web, ThreadPoolExecutor(2) as pool:
            source = MediaSource(["127.0.0.1"], [], MediaLimits(fetch_seconds=10), pool)
            fetches = [
                asyncio.create_task(fetch(gate, source, f"http://127.0.0.1:{web.port}/endless/{n}")) for n in range(4)
            ]
            most = 0
            while not all(task.done() for task in fetches):
                most = max(most, gate.held.bytes)
                await asyncio.sleep(0.001)
            ends = await asyncio.gather(*fetches, return_exceptions=True)
            await source.aclose()
        assert most <= 50 * MIB and gate.held.bytes == 0
        assert {type(end) for end in ends} <= {TooBusy, TooLarge} and TooBusy in {type(end) for end in ends}

    asyncio.run(check())


class Weighty(str):
    """A string that can be watched."""


class _Caller:
    client, declared_bytes, asked_timeout_s = "a", 0, None
    quiet, item_tokens = False, None

    def __init__(self, media: str) -> None:
        self._ask = Ask(None, Modality.IMAGE, [MediaItem(media)] * 3)

    async def read(self, charge):
        return self._ask

    @contextlib.asynccontextmanager
    async def until_gone(self):
        yield

    def answer_bytes(self, encoded):
        return 1

    async def refuse(self, error, req_id):
        pass


@pytest.mark.parametrize("failure", [BadMedia("damaged"), RuntimeError("a bug"), TimeoutError()])
def test_a_failed_request_leaves_nothing_for_the_collector(failure):
    from encode_server.pipeline.cache import EmbeddingCache
    from encode_server.pipeline.pipeline import Pipeline, Route
    from encode_server.runtime.pools import Pools

    metrics = Metrics()

    class Source:
        async def fetch(self, url, charge, client):
            return b"media"

    async def life() -> weakref.ref:
        pools = Pools(1)
        cache = EmbeddingCache(1000, metrics)
        pipeline = Pipeline(
            model="m",
            modalities=frozenset({Modality.IMAGE}),
            source=Source(),
            pools=pools,
            preparers=None,
            arena=None,
            engine=SimpleNamespace(until_ready=_ready),
            batcher=None,
            max_item_tokens=1,
        )

        async def compute(request, route, item, media, digest):
            raise type(failure)(*failure.args)

        pipeline._compute = compute
        route = Route(cache, metrics)
        settings = SimpleNamespace(timeout_s=5, video_fps=None, max_answer_mb=1, send_timeout_s=1)
        gate = Admission(AdmissionLimits(10, 1000, 1000, 1))

        async def encode(request: EncodeRequest):
            return await pipeline.encode(request, route)

        async def resolve(ask, req_id, client, held):
            return None

        server = SimpleNamespace(
            patient=False,
            settings=settings,
            metrics=metrics,
            history=History(),
            admission=gate,
            body_turns=ClientTurns(lambda: gate.clients),
            undelivered=Undelivered(100, 1),
            destinations=SimpleNamespace(resolve=resolve),
            active=None,
            model_name="m",
            check_model=lambda name: None,
            encode=encode,
            timeout_s=lambda asked: 5,
            not_ready=lambda: None,
        )
        media = Weighty("media")
        caller = _Caller(media)
        await serve_encode(server, caller)
        await asyncio.sleep(0)
        pools.close()
        return weakref.ref(media)

    async def _ready(group=None):
        return SimpleNamespace(dtype="float32", dims={Modality.IMAGE: 1})

    async def check():
        gone = await life()
        await asyncio.sleep(0)
        assert gone() is None

    gc.collect()
    gc.disable()
    try:
        asyncio.run(check())
    finally:
        gc.enable()


def test_let_go_follows_every_chain():
    class Big:
        pass

    def inner():
        kept = Big()
        refs.append(weakref.ref(kept))
        raise ValueError("inner")

    def outer():
        kept = Big()
        refs.append(weakref.ref(kept))
        try:
            inner()
        except ValueError as error:
            mine = BadMedia("outer")
            raise ExceptionGroup("group", [mine, error]) from None

    refs: list[weakref.ref] = []
    gc.disable()
    try:
        with pytest.raises(ExceptionGroup) as caught:
            outer()
        error = caught.value
        let_go(error)
        del caught
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


def test_an_error_about_media_says_nothing_of_the_media(server):
    answer = encode(server, [{"url": item(), "content_hash": "sha256:" + "0" * 64}])
    assert answer.status_code == 400 and "content_hash" in answer.json()["message"]
    assert "sha256:" not in answer.json()["message"]
