"""Media over HTTP, and who fetched them."""

from __future__ import annotations

import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TYPES = {"png": "image/png", "mp4": "video/mp4"}


class MediaServer:
    """Serves `files`, by name. `fetched`: how often each name was, by the first word of the user agent."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.fetched: Counter[tuple[str, str]] = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                outer.fetched[name, self.headers.get("User-Agent", "").split("/")[0]] += 1
                self.send_response(200)
                self.send_header("Content-Type", TYPES[name.rpartition(".")[2]])
                self.send_header("Content-Length", str(len(files[name])))
                self.end_headers()
                self.wfile.write(files[name])

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def total(self, name: str) -> int:
        return sum(count for (file, _), count in self.fetched.items() if file == name)

    def __enter__(self) -> MediaServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
