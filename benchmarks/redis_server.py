"""A real Redis or Valkey in a process of its own, and a proxy that makes it slow, deaf or untruthful."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable

from encode_server.pipeline.shared.redis import RedisLine, parse_address

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")


class RedisServer:
    """Without persistence. `options` as in the command line of redis-server."""

    def __init__(self, *options: str, port: int = 0) -> None:
        self.port = port or _free_port()
        self._options = options
        self._directory = tempfile.TemporaryDirectory()
        self.start()

    def start(self) -> None:
        assert PROGRAM is not None
        command = [PROGRAM, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self.process = subprocess.Popen(
            [*command, *self._options], cwd=self._directory.name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.01)
        raise AssertionError("it does not listen")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def __enter__(self) -> RedisServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._directory.cleanup()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def line(self, ttl_s: int = 60, url: str | None = None) -> RedisLine:
        return RedisLine(parse_address(url or self.url), ttl_s)

    def cli(self, *words: str) -> str:
        """What redis-cli prints."""
        program = shutil.which("valkey-cli") or shutil.which("redis-cli")
        assert program is not None
        done = subprocess.run([program, "-p", str(self.port), *words], capture_output=True, text=True, timeout=20)
        return done.stdout.strip()


class Proxy:
    """Forwards to a port. `delay_s`: before each piece of the answers. `deaf`: nothing is answered any more. `lie`:
    what becomes of a piece of the answers."""

    def __init__(self, port: int) -> None:
        self.delay_s, self.deaf = 0.0, False
        self.lie: Callable[[bytes], bytes] = bytes
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open = True
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        for each in (self._listener, *self._sockets):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            each.close()

    def _accept(self) -> None:
        while self._open:
            try:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                continue
            self._sockets += [near, far]
            threading.Thread(target=self._copy, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._copy, args=(far, near, True), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        try:
            while piece := source.recv(65536):
                if answers:
                    while self.deaf and self._open:
                        time.sleep(0.01)
                    time.sleep(self.delay_s)
                    piece = self.lie(piece)
                target.sendall(piece)
        except OSError:
            pass
        for each in (source, target):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
