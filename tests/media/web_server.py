"""A real HTTP server on loopback that behaves as badly as its paths say."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.seen.append((self.headers["Host"], self.path))
        action, _, rest = self.path.lstrip("/").partition("/")
        with contextlib.suppress(OSError):
            getattr(self, f"do_{action}")(rest)

    def do_ok(self, rest: str) -> None:
        self._answer(200, b"media " * 1000)

    def do_status(self, rest: str) -> None:
        self._answer(int(rest), b"no")

    def do_to(self, rest: str) -> None:
        self._answer(302, b"", ("Location", rest))

    def do_again(self, rest: str) -> None:
        left = int(rest)
        self._answer(307, b"", ("Location", f"/again/{left - 1}" if left else "/ok"))

    def do_size(self, rest: str) -> None:
        self._answer(200, bytes(int(rest)))

    def do_endless(self, rest: str) -> None:
        self._head(200, ("Transfer-Encoding", "chunked"))
        while True:
            self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    def do_crumbs(self, rest: str) -> None:
        self._head(200, ("Transfer-Encoding", "chunked"))
        self.wfile.write(b"1\r\nx\r\n" * int(rest) + b"0\r\n\r\n")

    def do_trickle(self, rest: str) -> None:
        self._head(200, ("Content-Length", "1000000"))
        while not self.server.over.wait(0.02):
            self.wfile.write(b"x")

    def do_silence(self, rest: str) -> None:
        self.server.over.wait(60)

    def do_short(self, rest: str) -> None:
        self._head(200, ("Content-Length", "1000"))
        self.wfile.write(b"x")
        self.close_connection = True

    def do_gzip(self, rest: str) -> None:
        self._answer(200, b"x", ("Content-Encoding", "gzip"))

    def do_rubbish(self, rest: str) -> None:
        self.wfile.write(b"no http at all\r\n\r\n")
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _head(self, status: int, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.end_headers()

    def _answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self._head(status, *headers, ("Content-Length", str(len(body))))
        self.wfile.write(body)


class WebServer(ThreadingHTTPServer):
    """`port`, and in `seen` the Host header and path of every request."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.port = self.server_address[1]
        self.seen: list[tuple[str, str]] = []
        self.over = threading.Event()


@contextlib.contextmanager
def web_server(port: int = 0) -> Iterator[WebServer]:
    """`port` 0 stands for any free one."""
    with WebServer(port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()
