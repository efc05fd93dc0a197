"""A request that outlasts its server, at a real listener."""

from __future__ import annotations

import json

from encode_server.runtime.ending import Ending
from tests.live import eventually
from tests.security.listener import app, listening


def test_who_is_not_answered_when_the_server_ends_is_told(caplog):
    reached = []

    async def waits(scope, receive, send):
        if scope["type"] == "http":
            reached.append(scope["path"])
        await app(scope, receive, send)

    with listening(application=Ending(waits)) as listener, listener.connect() as connection:
        connection.sendall(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        assert eventually(lambda: reached)
        listener.server.should_exit = True
        answer = b""
        while more := connection.recv(10_000):
            answer += more
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ") and json.loads(body)["code"] == "not_ready"
    assert not [record for record in caplog.records if record.exc_info]
