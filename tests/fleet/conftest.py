"""What the tests of fleets share: two encoders of one Qwen3-VL checkpoint with one store between them (a test may kill
`b`; the next gets a new one), and sockets that are closed at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from encode_server.delivery.folder import ENTRY
from tests.checkpoints import Checkpoints
from tests.live import LiveServer


class Fleet:
    """`a`, `b`: the servers. `entry(uuid)`: where an embedding is stored."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.checkpoint = Checkpoints(root / "checkpoints").path("qwen3_vl")
        self.store = root / "store"
        self._root, self._stack, self._started = root, stack, 0
        self.a, self.b = self._start(), self._start()
        self.a.healthy(240), self.b.healthy(240)

    @property
    def urls(self) -> list[str]:
        return [self.a.base_url, self.b.base_url]

    def whole(self) -> Fleet:
        if self.b.process.poll() is not None:
            self.b = self._start().healthy(240)
        return self

    def entry(self, identifier: str) -> Path:
        return self.store / identifier / ENTRY

    def _start(self) -> LiveServer:
        self._started += 1
        options = ("--ec-store", str(self.store))
        return self._stack.enter_context(LiveServer(self.checkpoint, self._root / f"tmp{self._started}", *options))


@pytest.fixture(scope="session")
def _fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    root = tmp_path_factory.mktemp("fleet")
    (root / "checkpoints").mkdir()
    with ExitStack() as stack:
        yield Fleet(root, stack)


@pytest.fixture
def fleet(_fleet: Fleet) -> Fleet:
    return _fleet.whole()


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    """Closed whatever becomes of the test: a failed test's sockets are collected in any order, and a context that is
    collected before its sockets waits for them forever."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)
