"""`encode-server route --protocol sglang`: a real proxy process between prefill ranks and stand-ins for encoders."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import ExitStack, contextmanager

import httpx
import pytest
import zmq

from encode_server.client import EncodeClient, encoders
from encode_server.delivery.sglang.registrations import Registrations
from encode_server.route.parts import Journey, PartRelay, PartRequest
from tests.fleet.encoder_standin import EncoderStandIn
from tests.fleet.engine_standin import EngineStandIn, served
from tests.live import LiveServer, eventually
from tests.server.prefill_standin import Bootstrap


class Rank:
    """A prefill rank's PULL socket; `names`: the parts that came."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._socket = context.socket(zmq.PULL)
        self.url = f"127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"

    def came(self, count: int, timeout_s: float = 30) -> list[str]:
        names = []
        for _ in range(count):
            assert self._socket.poll(int(timeout_s * 1000)), f"only {names} came"
            names.append(self._socket.recv().decode())
        assert not self._socket.poll(200), "a part came twice"
        return sorted(names)


@contextmanager
def route(tmp_path, *options: str, **environment: str) -> Iterator[LiveServer]:
    command = [sys.executable, "-m", "encode_server.cli", "route", "--protocol", "sglang", "--port", "0", *options]
    with LiveServer("", tmp_path / "route", command=command, environment=environment) as live:
        yield live.listening()


def to(*encoders: EncoderStandIn) -> list[str]:
    return [part for encoder in encoders for part in ("--encoder-url", encoder.url)]


def call(method: str, url: str, **more: object) -> httpx.Response:
    return httpx.request(method, url, timeout=60, **more)  # a limit that a busy machine does not meet


class Prefill:
    """Asks as SGLang's prefill asks: a POST for the part, and one for each rank's registration, from other threads."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], url: str, ranks: int = 1) -> None:
        self.url = url
        self.ranks = [Rank(context) for _ in range(ranks)]
        self._pool = ThreadPoolExecutor(64)
        self._http = httpx.Client(timeout=60, limits=httpx.Limits(max_connections=64))

    def part(self, name: str, media: str = "", **more: object) -> Future[httpx.Response]:
        body = {"req_id": name, "modality": "IMAGE", "mm_items": [{"url": media or name, "detail": "auto"}]}
        body |= {"num_parts": 1, "part_idx": 0, "prefill_host": "127.0.0.1", "embedding_port": None} | more
        return self._pool.submit(self._http.post, self.url + "/encode", json=body)

    def register(self, name: str) -> None:
        for rank in self.ranks:
            body = {"req_id": name, "receive_count": len(self.ranks), "receive_url": rank.url, "modality": "IMAGE"}
            answer = self._http.post(self.url + "/scheduler_receive_url", json=body)
            assert answer.status_code == 200, answer.text

    def ask(self, name: str, media: str = "") -> Future[httpx.Response]:
        future = self.part(name, media)
        self.register(name)
        return future


def test_parts_reach_every_rank_once_whenever_the_ranks_register(tmp_path, context):
    with EncoderStandIn() as a, EncoderStandIn() as b, route(tmp_path, *to(a, b)) as live:
        prefill = Prefill(context, live.base_url, ranks=2)
        prefill.register("early")
        parts = [prefill.part("early")]
        a.hold.clear(), b.hold.clear()
        parts.append(prefill.part("late"))
        assert eventually(lambda: a.asked.acquire(blocking=False) or b.asked.acquire(blocking=False))
        a.hold.set(), b.hold.set()
        prefill.register("late")
        assert [part.result().json() for part in parts] == [None, None]
        for rank in prefill.ranks:
            assert rank.came(2) == ["early", "late"]
        # zmq_to_tokenizer names its port in the request itself
        port = int(prefill.ranks[0].url.rpartition(":")[2])
        assert prefill.part("port", embedding_port=port).result().status_code == 200
        assert prefill.ranks[0].came(1) == ["port"]


def test_the_same_media_goes_to_the_same_encoder_and_a_busy_one_is_passed_over(tmp_path, context):
    with EncoderStandIn() as a, EncoderStandIn() as b, route(tmp_path, *to(a, b)) as live:
        prefill = Prefill(context, live.base_url)
        for number in range(24):
            assert prefill.ask(f"r{number}", f"image {number % 4}").result().status_code == 200
        media = {name: int(name[1:]) % 4 for name in a.encoded}, {name: int(name[1:]) % 4 for name in b.encoded}
        assert not set(media[0].values()) & set(media[1].values())
        owner, other = (a, b) if "r0" in a.encoded else (b, a)
        owner.backlog_s = 30.0
        prefill.ask("again", "image 0").result()  # its answer says how busy the owner is
        prefill.ask("busy", "image 0").result()
        assert "busy" in other.encoded


def test_a_strangers_registration_takes_no_ranks_place(tmp_path, context):
    with EncoderStandIn() as a, route(tmp_path, *to(a)) as live:
        stranger = httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=60)
        body = {"req_id": "r", "receive_count": 1, "receive_url": "127.0.0.3:9", "modality": "IMAGE"}
        assert stranger.post(live.base_url + "/scheduler_receive_url", json=body).status_code == 200
        prefill = Prefill(context, live.base_url)
        assert prefill.ask("r").result().status_code == 200
        assert prefill.ranks[0].came(1) == ["r"]


def test_a_part_whose_encoder_dies_is_delivered_by_another(tmp_path, context):
    with EncoderStandIn("dies") as a, EncoderStandIn() as b, route(tmp_path, *to(a, b)) as live:
        prefill = Prefill(context, live.base_url, ranks=2)
        parts = [prefill.ask(f"r{number}") for number in range(20)]
        assert [part.result().status_code for part in parts] == [200] * 20
        for rank in prefill.ranks:
            assert rank.came(20) == sorted(f"r{number}" for number in range(20))
        assert "failures=1" in live.log
        assert 'route_part_failures_total{reason="unreachable"}' in call("GET", live.base_url + "/metrics").text


def test_an_encoder_that_answers_nothing_any_more_loses_its_parts(monkeypatch, context):
    monkeypatch.setattr(encoders, "PROBE_TIMEOUT_S", 0.2)

    async def scenario(a: EncoderStandIn, b: EncoderStandIn):
        pool = encoders.Encoders([a.url, b.url], EncodeClient, "content", 0.1)
        relay = PartRelay(pool, Registrations(), 4, lambda reason: None)
        watcher = asyncio.create_task(pool.watch())
        key = next(key for key in (b"%d" % n for n in range(100)) if pool.pick(key).url == a.url)
        body = json.dumps({"req_id": "r", "prefill_host": "127.0.0.1", "embedding_port": int(rank.url[10:])}).encode()
        part = PartRequest("r", body, key, 1, registers=False, deadline=time.monotonic() + 60)
        answer = await relay.deliver(part, journey := Journey())
        watcher.cancel()
        return answer.status, journey

    rank = Rank(context)
    with EncoderStandIn("frozen") as a, EncoderStandIn() as b:
        status, journey = asyncio.run(scenario(a, b))
        assert status == 200 and journey.encoder == b.url and journey.failures == 1
        assert rank.came(1) == ["r"]


def test_it_waits_for_encoders_that_are_full_loading_or_not_there_yet(tmp_path, context):
    with EncoderStandIn("full") as a, EncoderStandIn("loading") as b, route(tmp_path, *to(a)) as live:
        prefill = Prefill(context, live.base_url)
        part = prefill.ask("full")
        assert a.asked.acquire(timeout=30)
        call("POST", live.base_url + "/register_encoder_url", json={"url": b.url})
        waiting = prefill.ask("loading")
        assert not part.done() and not waiting.done()
        b.mode = "well"
        assert part.result().status_code == waiting.result().status_code == 200
        assert set(b.encoded) <= {"full", "loading"} and b.encoded
        a.mode = "well"


def test_a_part_tried_again_at_the_same_encoder_registers_its_ranks_again(tmp_path, context):
    with EncoderStandIn("full") as a, route(tmp_path, *to(a)) as live:
        prefill = Prefill(context, live.base_url)
        a.hold.clear()
        part = prefill.ask("r")
        assert a.asked.acquire(timeout=30)
        assert eventually(lambda: a.registered("r") == 1)
        a.hold.set()  # the refusal
        assert a.asked.acquire(timeout=30)
        a.mode = "well"
        assert part.result().status_code == 200 and prefill.ranks[0].came(1) == ["r"]


def test_a_refusal_of_the_media_is_passed_on_and_told_to_no_rank(tmp_path, context):
    with EncoderStandIn("bad") as a, EncoderStandIn("bad") as b, route(tmp_path, *to(a, b)) as live:
        prefill = Prefill(context, live.base_url)
        answer = prefill.ask("r").result()
        assert answer.status_code == 400 and answer.json() == {"message": "bad"}
        seen = a.headers + b.headers
        assert len(seen) == 1 and seen[0]["X-Encode-Errors"] == "answer"
        assert 0 < float(seen[0]["X-Encode-Timeout-S"]) <= 170


def test_an_error_waits_for_the_parts_that_are_on_their_way_to_the_same_prefill(tmp_path, context):
    """The error ends that prefill, and with it everything that has not arrived."""
    with EncoderStandIn() as a, route(tmp_path, *to(a)) as live:
        prefill = Prefill(context, live.base_url)
        a.hold.clear()
        slow = prefill.ask("slow")
        assert a.asked.acquire(timeout=30)
        malformed = call("POST", live.base_url + "/encode", json={"req_id": "x", "mm_items": []})
        assert malformed.status_code == 400, "it names no prefill"
        elsewhere = prefill.part("r", "broken", prefill_host="10.0.0.1")
        assert elsewhere.result().status_code == 400
        broken = prefill.part("broken")
        with pytest.raises(FutureTimeout):
            broken.result(0.5)
        a.hold.set()
        assert slow.result().status_code == 200 and broken.result().status_code == 400


def test_time_is_up_when_no_encoder_comes(tmp_path, context):
    with route(tmp_path, "--timeout-s", "0.5") as live:
        answer = Prefill(context, live.base_url).ask("r").result()
        assert answer.status_code == 504 and "no encoder was well" in answer.json()["message"]
        assert call("GET", live.base_url + "/health").status_code == 200  # or the prefill's bootstrap would forget it
        assert call("GET", live.base_url + "/readyz").status_code == 503


def test_encoders_register_and_leave_and_the_proxy_registers_itself(tmp_path, context):
    with EncoderStandIn() as a, EncoderStandIn() as b, Bootstrap() as bootstrap:
        with route(tmp_path, "--register-url", bootstrap.url) as live:
            assert bootstrap.urls == []
            for url in (a.url, b.url + "/"):
                assert call("POST", live.base_url + "/register_encoder_url", json={"url": url}).status_code == 200
            listed = call("GET", live.base_url + "/list_encoder_urls").json()
            assert listed == {"encoder_urls": [a.url, b.url]}
            assert eventually(lambda: bootstrap.urls == [live.base_url])
            call("DELETE", live.base_url + "/unregister_encoder_url", json={"url": a.url})
            prefill = Prefill(context, live.base_url)
            parts = [prefill.ask(f"r{number}") for number in range(10)]
            assert all(part.result().status_code == 200 for part in parts)
            assert len(b.encoded) == 10 and not a.encoded
            for url in ("http://8.8.8.8:1", "ftp://a:1", "http://127.0.0.1:1/path"):
                answer = call("POST", live.base_url + "/register_encoder_url", json={"url": url})
                assert answer.status_code in (400, 403), url
            assert live.terminate() == 0
        assert bootstrap.urls == []


def test_a_name_stands_for_all_its_addresses(tmp_path, context):
    with EncoderStandIn() as a, route(tmp_path, "--encoder-dns", a.url.replace("127.0.0.1", "localhost")) as live:
        assert Prefill(context, live.base_url).ask("r").result().status_code == 200
        assert a.url in call("GET", live.base_url + "/readyz").json()["encoders"]


def test_what_is_in_progress_ends_before_the_proxy_does(tmp_path, context):
    with EncoderStandIn() as a, ExitStack() as stack:
        engine = EngineStandIn(tmp_path)
        engine.url = stack.enter_context(served(engine.app()))
        live = stack.enter_context(route(tmp_path, *to(a), "--engine-url", engine.url))
        prefill = Prefill(context, live.base_url)
        a.hold.clear()
        part = prefill.ask("r")
        assert a.asked.acquire(timeout=30)
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.stream("POST", live.base_url + "/v1/chat/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            live.process.terminate()
            live.wait_for_log("Shutting down|Waiting for")
            assert live.process.poll() is None
            engine.go_on.set()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        a.hold.set()
        assert part.result().status_code == 200
        assert live.process.wait(30) == 0


def test_options_come_from_the_environment_and_a_key_guards_the_chat_api(tmp_path):
    with EncoderStandIn() as a, ExitStack() as stack:
        engine = EngineStandIn(tmp_path)
        engine.url = stack.enter_context(served(engine.app()))
        environment = {"ENCODE_ROUTE_ENCODER_URL": a.url, "ENCODE_ROUTE_API_KEYS": "secret"}
        live = stack.enter_context(route(tmp_path, ENCODE_ROUTE_ENGINE_URL=engine.url, **environment))
        chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
        url = live.base_url + "/v1/chat/completions"
        assert call("POST", url, json=chat).status_code == 401
        assert call("POST", url, json=chat, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert call("GET", live.base_url + "/v1/models").status_code == 401
        assert call("GET", live.base_url + "/livez").json()["status"] == "alive"
        assert call("GET", live.base_url + "/readyz").status_code == 200
        text = call("GET", live.base_url + "/metrics").text
        assert 'route_requests_total{path="/v1/chat/completions",status="401"} 1.0' in text
        assert f'route_encoder_up{{encoder="{a.url}"}} 1.0' in text
        assert "POST /v1/chat/completions status=200" in live.log
    with route(tmp_path / "tls", ENCODE_ROUTE_PROTOCOL="sglang") as live:
        assert call("POST", live.base_url + "/v1/chat/completions", json=chat).status_code == 404


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--protocol", "vllm", "--encoder-url", "http://a:1"], "--engine-url is missing"),
        (["--protocol", "vllm", "--engine-url", "http://a:1"], "--encoder-url or --encoder-dns is missing"),
        (["--register-url", "a:1"], "--register-url"),
        (["--ssl-certfile", "x"], "go together"),
        (["--encoder-dns", "http://a:1/path"], "--encoder-dns"),
        (["--max-waiting-mb", "64"], "--max-waiting-mb is below --max-body-mb"),
    ],
)
def test_options_that_cannot_work_are_said(tmp_path, options, said):
    command = [sys.executable, "-m", "encode_server.cli", "route", "--protocol", "sglang", "--port", "0", *options]
    with LiveServer("", tmp_path, command=command) as live:
        assert live.process.wait(20) == 1
        live.wait_for_log(said)


def test_many_bodies_wait_unread(tmp_path, context):
    """Two megabytes at a time: the third waits until one has been delivered."""
    with EncoderStandIn() as a, route(tmp_path, *to(a), "--max-waiting-mb", "2", "--max-body-mb", "1") as live:
        prefill = Prefill(context, live.base_url)
        a.hold.clear()
        parts = [prefill.ask(f"r{number}", str(number) * (900 << 10)) for number in range(4)]
        assert a.asked.acquire(timeout=30) and a.asked.acquire(timeout=30)
        assert not a.asked.acquire(timeout=0.5)
        threading.Timer(0.1, a.hold.set).start()
        assert [part.result().status_code for part in parts] == [200] * 4


def test_a_body_that_finds_no_room_in_time_is_said(tmp_path, context):
    with (
        EncoderStandIn() as a,
        route(tmp_path, *to(a), "--max-waiting-mb", "1", "--max-body-mb", "1", "--timeout-s", "1.5") as live,
    ):
        prefill = Prefill(context, live.base_url)
        a.hold.clear()
        first = prefill.ask("r0", "0" * (900 << 10))
        assert a.asked.acquire(timeout=30)
        second = prefill.ask("r1", "1" * (900 << 10)).result()
        a.hold.set()
        assert second.status_code == 504 and first.result().status_code in (200, 504)
