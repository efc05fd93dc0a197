"""An encoder as the balancer sees it, in a thread: it notes what it is asked, and pushes the part's name where it is
told to. It can be slow, full, frozen, or die in the middle of a request."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import zmq


class EncoderStandIn:
    """Media that says `broken` is refused. `mode`: `well`, `full` (429), `loading` (503), `bad` (400), `dies` (the
    connection breaks when an encode comes), `frozen` (no answers at all). `backlog_s`: what it says of its work.
    `hold`: encodes wait while it is not set."""

    def __init__(self, mode: str = "well", port: int = 0) -> None:
        self.mode, self.backlog_s = mode, 0.0
        self.encoded: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.asked = threading.Semaphore(0)  # released for each encode that begins
        self.hold = threading.Event()
        self.hold.set()
        self._registered: dict[str, dict[str, dict]] = {}  # by req_id, then by receive_url: a retry says it again
        self._arrived = threading.Condition()
        self._context = zmq.Context()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.frozen()
                well = outer.mode != "loading"
                self.reply(200 if well else 503, {"backlog_seconds": outer.backlog_s, "capacity": None})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.frozen()
                if self.path == "/scheduler_receive_url":
                    with outer._arrived:
                        outer._registered.setdefault(body["req_id"], {})[body["receive_url"]] = body
                        outer._arrived.notify_all()
                    return self.reply(200, None)
                outer.headers.append(dict(self.headers))
                if "broken" in str(body.get("mm_items")):
                    return self.reply(400, {"message": "broken"})
                outer.asked.release()
                outer.hold.wait(30)
                if outer.mode == "dies":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return None
                status = {"full": 429, "loading": 503, "bad": 400}.get(outer.mode, 200)
                if status != 200:
                    return self.reply(status, {"message": outer.mode})
                outer.push(body)
                outer.encoded.append(body["req_id"])
                return self.reply(200, None)

            def reply(self, status: int, document: object) -> None:
                data = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("X-Encode-Backlog-S", str(outer.backlog_s))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_: object) -> None:
                pass  # a client that went away

        self._server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def frozen(self) -> None:
        while self.mode == "frozen":
            time.sleep(0.02)

    def registered(self, name: str) -> int:
        """How many ranks have said where they receive this part."""
        with self._arrived:
            return len(self._registered.get(name, {}))

    def push(self, body: dict) -> None:
        """Send the part's name to every rank that wants it."""
        name = body["req_id"]
        if body.get("embedding_port") is not None:
            urls = [f"{body['prefill_host']}:{body['embedding_port']}"]
        else:
            with self._arrived:
                assert self._arrived.wait_for(lambda: self._complete(name), 30)
                urls = list(self._registered.pop(name))
        for url in urls:
            with self._context.socket(zmq.PUSH) as push:
                push.connect(f"tcp://{url}")
                push.send(name.encode())
                push.close(linger=5000)

    def _complete(self, name: str) -> bool:
        known = self._registered.get(name, {})
        return any(body["receive_count"] == len(known) for body in known.values())

    def __enter__(self) -> EncoderStandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.mode = "well"
        self.hold.set()
        self._server.shutdown()
        self._server.server_close()
