"""The name of a request's content, and what happens when an encoder is lost, over stand-ins of Ray Serve's handles."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

pytest.importorskip("ray", reason="the extra `ray` is not installed")

from ray.exceptions import ActorUnavailableError, RayTaskError
from starlette.requests import Request

from encode_server.cluster.door import HELD_BYTES, Door, DoorOptions, content_key

OK = [{"type": "http.response.start", "status": 200, "headers": [(b"x-a", b"b")]}, {"body": b"rows"}, {"body": b""}]
LEAVING = [{"type": "http.response.start", "status": 503, "headers": []}, {"body": b"stopping"}]
LOST = ActorUnavailableError("gone", None)


class Handle:
    """Answers call after call with what it was given: messages, or messages and then an exception."""

    def __init__(self, *calls: Iterable[Any]) -> None:
        self.calls, self.keys = list(calls), []

    def options(self, **options: Any) -> Handle:
        if "session_id" in options:
            self.keys.append(options["session_id"])
        return self

    async def remote(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Any]:
        for message in self.calls.pop(0):
            if isinstance(message, Exception):
                raise message
            yield message


def ask(
    handle: Handle,
    body: bytes = b'{"mm_items":["x"]}',
    retry_s: float = 5.0,
    *,
    method: str = "POST",
    path: str = "/encode",
    keys: tuple[str, ...] = (),
    key: str = "",
) -> tuple[int, bytes]:
    """Status and body of the door's answer."""
    options = DoorOptions(keys, 4, 4 << 20, 1 << 20, 1.0, 0, retry_s, True)
    headers = [(b"authorization", b"Bearer " + key.encode())] if key else []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def scenario() -> tuple[int, bytes]:
        scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        answer = await Door(handle, options)(Request(scope, receive))
        await answer(scope | {"asgi": {"spec_version": "2.4"}}, receive, send)
        return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)

    return asyncio.run(scenario())


@pytest.mark.parametrize("first", [[LOST], [OK[0], LOST], [OK[0], OK[1], LOST], LEAVING])
def test_a_request_whose_encoder_is_lost_goes_to_another_one(first):
    handle = Handle(first, OK)
    assert ask(handle) == (200, b"rows") and handle.calls == []


def test_encoders_that_stay_lost_are_told_as_503():
    assert ask(Handle([LOST], [LOST]), retry_s=0.1)[0] == 503
    assert ask(Handle(LEAVING, LEAVING), retry_s=0.1) == (503, b"stopping")


def test_a_probe_is_answered_as_things_are():
    assert ask(Handle(LEAVING), b"", 60, method="GET", path="/health") == (503, b"stopping")


def test_who_has_no_key_is_not_read():
    assert ask(Handle(), keys=("k",))[0] == 401 and ask(Handle(), keys=("k",), key="other")[0] == 401
    assert ask(Handle(OK), keys=("k",), key="k") == (200, b"rows")
    assert ask(Handle(OK), b"", method="GET", path="/readyz", keys=("k",))[0] == 200


def test_what_is_of_one_server_is_not_there():
    for method, path in (("GET", "/"), ("GET", "/status"), ("POST", "/start_profile"), ("DELETE", "/encode")):
        assert ask(Handle(), method=method, path=path)[0] == 404


def test_a_fault_of_the_code_is_not_tried_again():
    with pytest.raises(RayTaskError):
        ask(Handle([RayTaskError("handle", "a traceback", ValueError("x"))]))


def test_an_answer_too_large_to_be_held_is_streamed():
    piece = {"body": b"x" * (HELD_BYTES // 4)}
    assert len(ask(Handle([OK[0], *[piece] * 6]))[1]) == 6 * (HELD_BYTES // 4)


def test_a_body_beyond_the_limit_reaches_no_encoder():
    assert ask(Handle(), body=b"x" * ((1 << 20) + 1))[0] == 413


def test_the_same_content_has_the_same_name_however_it_is_asked_for():
    named = [{"mm_items": ["abc"], "req_id": str(n), "timeout_s": n} for n in (1, 2)]
    named.append({"mm_items": [{"url": "abc", "uuid": "1"}, "more"]})
    assert len({content_key(json.dumps(document).encode()) for document in named}) == 1
    others = [
        b'{"input":"a","modality":"image"}',
        b'{"input":"b","modality":"image"}',
        b"{}",
        b"[[",
        b"--form\r\n1",
        b"--form\r\n2",
        b'{"mm_items": ["abd"]}',
        b'{"mm_items": [{"content_hash": "s"}]}',
    ]
    assert len({content_key(body) for body in others}) == len(others)
