"""`encode-server route`: a real proxy process, real encoders, and an engine that looks for the embeddings."""

from __future__ import annotations

import base64
import json
import select
import socket
import sys
from collections.abc import Iterator

import httpx
import pytest

from tests.fleet.engine_standin import WAIT_S, WORDS, EngineStandIn, served
from tests.live import LiveServer, eventually
from tests.models.samples import clip, png


@pytest.fixture(scope="module")
def engine(_fleet) -> Iterator[EngineStandIn]:
    stand_in = EngineStandIn(_fleet.store)
    stand_in.go_on.set()
    with served(stand_in.app()) as stand_in.url:
        yield stand_in


def router(tmp_path, engine_url: str, encoders: list[str], *options: str) -> LiveServer:
    urls = [part for url in encoders for part in ("--encoder-url", url)]
    arguments = ["route", "--port", "0", "--engine-url", engine_url, *urls, *options]
    return LiveServer("", tmp_path, command=[sys.executable, "-m", "encode_server.cli", *arguments])


@pytest.fixture(scope="module")
def route(_fleet, engine, tmp_path_factory) -> Iterator[str]:
    with router(tmp_path_factory.mktemp("route"), engine.url, _fleet.whole().urls) as live:
        yield live.wait_for_log(r"serving .* on (http://\S+:\d+)")[1]


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64," + base64.b64encode(data).decode()


def image(data: bytes, **more: object) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_uri(data)}} | more


def chat(*parts: dict[str, object], **more: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]} | more


def post(route: str, body: object, path: str = "/v1/chat/completions", **more: object) -> httpx.Response:
    return httpx.post(route + path, json=body, timeout=60, **more)


def test_embeddings_are_in_place_when_the_engine_is_asked(fleet, engine, route):
    video = {"type": "video_url", "video_url": {"url": data_uri(clip(4, 64, 64), "image/gif")}}
    body = chat(image(png(64, 64, 20)), image(png(64, 96, 21)), video, temperature=0)
    answer = post(route, body, headers={"Authorization": "Bearer engine-key", "X-Request-Id": "r7"})
    assert answer.json()["choices"][0]["message"]["content"] == "one two three"
    assert answer.headers.get_list("x-request-id") == ["r7"]
    found = engine.found[-1]
    assert len(found) == 3 and all(found.values())
    assert engine.headers[-1]["authorization"] == "Bearer engine-key" and engine.headers[-1]["x-request-id"] == "r7"
    forwarded = engine.seen[-1]
    for part in forwarded["messages"][0]["content"]:
        part.pop("uuid", None)
    assert forwarded == body, "nothing but the names was added"


def test_its_page_shows_the_encoders(fleet, route):
    assert httpx.get(route + "/v1/models", timeout=10).status_code == 200
    document = httpx.get(route + "/status", timeout=10).json()
    assert [row["url"] for row in document["encoders"]] == fleet.urls
    assert all(row["healthy"] and row["source"] == "options" for row in document["encoders"])
    assert document["verdict"]["level"] == "well" and document["engine"] is True
    assert sum(document["timeline"]["ok"]) > 0
    assert "<title>" in httpx.get(route + "/", timeout=10).text


def test_the_encoders_see_the_callers_trace_and_id(fleet, route):
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "X-Request-ID": "asked-by-7"}
    assert post(route, chat(image(png(64, 64, 177))), headers=headers).status_code == 200
    said = f"id=asked-by-7 trace={trace}"
    assert eventually(lambda: any(said in server.log for server in (fleet.a, fleet.b)), 10)


def test_names_follow_content_and_the_callers_uuid(fleet, engine, route):
    first, second = png(64, 64, 22), png(64, 64, 23)
    post(route, chat(image(first), image(second), image(first)))
    one, two, three = (part["uuid"] for part in engine.seen[-1]["messages"][0]["content"][:3])
    assert one == three != two
    post(route, chat(image(first, uuid="../../mine")))
    mine = engine.seen[-1]["messages"][0]["content"][0]["uuid"]
    assert mine != one and mine.isalnum() and engine.found[-1] == {mine: True}


def test_a_stream_comes_chunk_by_chunk(fleet, engine, route):
    engine.go_on.clear()
    body = chat(image(png(64, 64, 24)), stream=True)
    with httpx.stream("POST", route + "/v1/chat/completions", json=body, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert json.loads(next(lines)[6:])["choices"][0]["delta"]["content"] == WORDS[0], "before the engine went on"
        engine.go_on.set()
        rest = [line for line in lines if line]
    assert len(rest) == 3 and rest[-1] == "data: [DONE]"
    assert not engine.waited_in_vain


def test_a_caller_who_leaves_ends_the_engines_work(fleet, engine, route):
    engine.gone.clear()
    engine.go_on.clear()
    body = chat(image(png(64, 64, 25)), stream=True)
    with httpx.stream("POST", route + "/v1/chat/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    try:
        assert engine.gone.wait(WAIT_S / 2)  # before it would have gone on by itself
    finally:
        engine.go_on.set()


def test_without_media_the_request_is_not_touched(fleet, engine, route):
    raw = b'{"messages": [ {"role":"user","content":"hi"} ],  "model":"m"}'
    answer = httpx.post(route + "/v1/chat/completions", content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200 and engine.seen[-1]["messages"][0]["content"] == "hi"
    assert int(engine.headers[-1]["content-length"]) == len(raw)
    assert httpx.get(route + "/v1/models").json() == {"data": [{"id": "m"}]}


def test_options_that_rename_leave_the_media_to_the_engine(fleet, engine, route):
    post(route, chat(image(png(64, 64, 26)), mm_processor_kwargs={"max_pixels": 5000}))
    assert engine.found[-1] == {}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": "x"}, "messages"),
        ([], "messages"),
        (chat({"type": "image_url", "image_url": {"uri": "x"}}), "url"),
        (chat({"type": "input_audio", "input_audio": {"data": 5}}), "input_audio"),
        (chat({"type": "image_url", "image_url": {"url": "x"}, "uuid": [[[]]]}), "uuid"),
        (chat({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}), "mm_items[0]"),
    ],
)
def test_a_bad_request_is_answered_as_openai_would(fleet, engine, route, body, said):
    before = len(engine.seen)
    answer = post(route, body)
    error = answer.json()["error"]
    assert answer.status_code == 400 == error["code"] and said in error["message"] and len(engine.seen) == before


def test_the_engines_own_errors_pass(fleet, engine, route):
    answer = post(route, chat(image(png(64, 64, 27)), model="unknown"))
    assert answer.status_code == 404 and answer.json() == {"error": {"message": "no such model"}}


def test_another_encoder_takes_over_and_an_absent_engine_is_said(fleet, engine, tmp_path):
    with router(tmp_path / "one", engine.url, ["http://127.0.0.1:9", fleet.a.base_url]) as live:
        url = live.wait_for_log(r"serving .* on (http://\S+:\d+)")[1]
        live.wait_for_log("startup complete")
        for seed in range(30, 36):
            assert post(url, chat(image(png(64, 64, seed)))).status_code == 200
            assert all(engine.found[-1].values())
    with router(tmp_path / "two", "http://127.0.0.1:9", ["http://127.0.0.1:9"], "--timeout-s", "1") as live:
        url = live.wait_for_log(r"serving .* on (http://\S+:\d+)")[1]
        live.wait_for_log("startup complete")
        answer = post(url, chat(image(png(64, 64, 40))))
        assert answer.status_code == 502 and "engine does not answer" in answer.json()["error"]["message"]
        answer = httpx.get(url + "/v1/models")
        assert answer.status_code == 502 and "engine does not answer" in answer.json()["error"]["message"]
        assert httpx.get(url + "/health").status_code == 503
        assert live.terminate() == 0
    with router(tmp_path / "three", engine.url, ["http://127.0.0.1:9"], "--timeout-s", "1") as live:
        url = live.wait_for_log(r"serving .* on (http://\S+:\d+)")[1]
        live.wait_for_log("startup complete")
        answer = post(url, chat(image(png(64, 64, 40))))
        assert answer.status_code == 504 and "could not be encoded" in answer.json()["error"]["message"]


def test_options_are_checked(tmp_path):
    with router(tmp_path, "localhost:8000", ["http://127.0.0.1:9"]) as live:
        assert live.process.wait(20) == 1
        live.wait_for_log("'localhost:8000' is not a URL")


def test_nothing_outside_v1_is_reached(route):
    """Dots in the path, plain or encoded, would be resolved on the way to the engine."""
    host, port = route.removeprefix("http://").split(":")
    for path in (
        "/v1/../metrics",
        "/v1/%2e%2e/metrics",
        "/v1/%252e%252e/metrics",
        "/v1/%25252e./x",
        "/v1/..%2fx",
        "/v1/%5c..%5cx",
        "/v1/x%00",
        "/v1/x%250a",
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_paths_go_on_as_they_came(engine, route):
    path = "/v1/files/a%20b%2Fc%25d?x=1&y=%26"
    assert httpx.get(route + path).status_code == 200 and engine.paths[-1] == path


def test_a_part_of_no_known_type_is_the_engines_business(fleet, engine, route):
    assert post(route, chat({"type": []}, {"type": {}}, {"type": 5})).status_code == 200


def test_whom_the_engine_does_not_know_gets_nothing_encoded(fleet, engine, tmp_path):
    stored = set(fleet.store.iterdir())
    engine.key = "right"
    try:
        with router(tmp_path, engine.url, fleet.urls) as live:
            url = live.wait_for_log(r"serving .* on (http://\S+:\d+)")[1]
            live.wait_for_log("startup complete")
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                answer = post(url, chat(image(png(64, 64, 77))), headers=headers)
                assert answer.status_code == 401 and answer.json() == {"error": "Unauthorized"}
            assert set(fleet.store.iterdir()) == stored
            right = {"Authorization": "Bearer right"}
            assert post(url, chat(image(png(64, 64, 77))), headers=right).status_code == 200
            assert set(fleet.store.iterdir()) != stored
    finally:
        engine.key = ""


def test_bodies_at_the_proxy_have_bounds_too(fleet, engine, tmp_path):
    with router(tmp_path, engine.url, fleet.urls, "--max-inflight-mb", "8", "--max-requests", "4") as live:
        url = live.wait_for_log(r"serving .* on (http://\S+:\d+)")[1]
        live.wait_for_log("startup complete")
        host, port = url.removeprefix("http://").split(":")
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 6000000\r\n\r\n"
        with socket.create_connection((host, int(port))) as one, socket.create_connection((host, int(port))) as other:
            for connection in (one, other):
                connection.sendall(head + b"x" * 5_900_000)
            one.settimeout(10), other.settimeout(10)
            assert b"429" in _first(one, other)
        assert post(url, chat()).status_code == 200


def _first(*connections: socket.socket) -> bytes:
    """What arrives first at any of them."""
    ready, _, _ = select.select(connections, [], [], 20)
    return ready[0].recv(100) if ready else b""
