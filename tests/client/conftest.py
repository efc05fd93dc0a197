"""Fixtures of the client's tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from encode_standin import StandIn


@pytest.fixture
def anyio_backend() -> str:
    """The client is written for asyncio."""
    return "asyncio"


@pytest.fixture
def server() -> Iterator[StandIn]:
    """A stand-in server listening on a port of its own, in a thread."""
    stand_in = StandIn()
    listener = socket.create_server(("127.0.0.1", 0))
    stand_in.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    running = uvicorn.Server(uvicorn.Config(stand_in.app(), log_level="error", lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    yield stand_in
    running.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()
    listener.close()
