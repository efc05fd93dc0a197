"""A prefill rank's PULL socket, and a bootstrap server, as SGLang has them."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import zmq

from tests.delivery import sglang_standin as sglang


class PrefillRank:
    """Receives on a port of its own and reads as SGLang reads."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.url = f"127.0.0.1:{self.port}"

    def __enter__(self) -> PrefillRank:
        return self

    def __exit__(self, *_: object) -> None:
        self._context.destroy(linger=0)

    def receive(self, timeout_s: float = 20):
        assert self._socket.poll(int(timeout_s * 1000)), "nothing came"
        return sglang.read(self._socket.recv_multipart())

    def nothing_came(self, within_s: float = 0.3) -> bool:
        return not self._socket.poll(int(within_s * 1000))


class Bootstrap:
    """Registers encoders in a dictionary that dies with it. `seen` outlives it: (time, verb, url)."""

    def __init__(self, port: int = 0) -> None:
        self.urls: list[str] = []
        self.seen: list[tuple[float, str, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self, body: bytes) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _url(self) -> str:
                return json.loads(self.rfile.read(int(self.headers["Content-Length"])))["url"]

            def do_GET(self) -> None:
                assert self.path == "/list_encoder_urls"
                self._answer(json.dumps({"encoder_urls": outer.urls}).encode())

            def do_POST(self) -> None:
                assert self.path == "/register_encoder_url"
                outer.note("register", url := self._url())
                if url not in outer.urls:
                    outer.urls.append(url)
                self._answer(b"OK")

            def do_DELETE(self) -> None:
                assert self.path == "/unregister_encoder_url"
                outer.note("unregister", url := self._url())
                outer.urls.remove(url)
                self._answer(b"OK")

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def note(self, verb: str, url: str) -> None:
        self.seen.append((time.monotonic(), verb, url))

    def __enter__(self) -> Bootstrap:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
