"""A listener like the server's, before an application of three lines, in a thread of the test."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import uvloop

from encode_server.runtime.connections import ConnectionLimits
from encode_server.runtime.listening import Uvicorn, bind, config


@dataclass
class Listener:
    port: int
    server: Uvicorn

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    @property
    def open(self) -> int:
        return len(self.server.server_state.connections)


async def app(scope, receive, send):
    """`/large` answers 2 MB, `/wait` never, `/early` before the body was read, all else what was sent."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body, more = b"", scope["path"] != "/early"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    if scope["path"] == "/wait":
        while (await receive())["type"] != "http.disconnect":
            pass
        return
    answer = bytes(8 << 20) if scope["path"] == "/large" else body or b"ok"
    headers = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


@contextlib.contextmanager
def listening(limits: ConnectionLimits | None = None, application=app, **tls: str) -> Iterator[Listener]:
    """`tls`: uvicorn's `ssl_certfile` and `ssl_keyfile`."""
    with bind("127.0.0.1", 0) as sock:
        server = Uvicorn(config(application, limits or ConnectionLimits(), grace_s=1, **tls))
        thread = threading.Thread(target=lambda: uvloop.run(server.serve(sockets=[sock])))
        thread.start()
        try:
            yield Listener(sock.getsockname()[1], server)
        finally:
            server.should_exit = True
            thread.join(10)
