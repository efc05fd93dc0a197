"""A server that answers as asked: `delay_s`, then a status and an embedding of the shape it is told."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager


class Standin:
    """Behaviour by request number: `answers(number)` → (status, delay in seconds), status 0 hangs up."""

    def __init__(self, answers=lambda number: (200, 0.0), shape=(4, 8)):
        self.answers, self.shape = answers, shape
        self.bodies: list[bytes] = []
        self.connections = 0
        self.in_work = self.most_in_work = 0
        self.url = ""

    @asynccontextmanager
    async def running(self):
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                number = len(self.bodies)
                self.bodies.append(await reader.readexactly(length))
                self.in_work += 1
                self.most_in_work = max(self.most_in_work, self.in_work)
                status, delay = self.answers(number)
                await asyncio.sleep(delay)
                self.in_work -= 1
                if not status:
                    break
                body = self._embedding() if status == 200 else b'{"code":"overloaded"}'
                writer.write(b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _embedding(self) -> bytes:
        size = self.shape[0] * self.shape[1] * 4
        header = json.dumps({"embedding": {"dtype": "F32", "shape": self.shape, "data_offsets": [0, size]}}).encode()
        return len(header).to_bytes(8, "little") + header + bytes(range(256)) * (size // 256) + bytes(size % 256)
