"""Those who do harm in a chaos run: each an endless task that notes what it did and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable

import httpx
import zmq
import zmq.asyncio

from benchmarks import procfs
from encode_server.media.samples import noise

POISON = {"kill": (364, 28), "error": (448, 28), "hang": (392, 28)}  # see benchmarks/faults
DECODER_CRASH = b"crash the decoder"  # at the end of an image, see benchmarks/faults


def _client() -> httpx.AsyncClient:
    # A connection that has been idle for less than uvicorn's 5 s, so that none is closed just as it is used again.
    return httpx.AsyncClient(timeout=120, limits=httpx.Limits(keepalive_expiry=3))


class Monkeys:
    """`counts`: what was done. `surprises`: answers that no fault explains."""

    def __init__(self, url: str, front: int, seed: int) -> None:
        self._url, self._front, self._random = url, front, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.surprises: Counter[str] = Counter()

    async def disasters(self, every_s: float) -> None:
        """What costs processes, in turn: ranks, preparers and the forkserver killed, ranks and preparers stopped (their
        work hangs), images that do it to a forward.

        The pause counts from when the server is ready again: ranks hit while they load would never serve.
        """
        kill, stop = signal.SIGKILL, signal.SIGSTOP
        disasters: list[str | tuple[str, signal.Signals]] = [
            *(("rank", kill), ("preparer", kill), "error", ("rank", stop), ("preparer", stop)),
            *("kill", ("forkserver", kill), "hang"),
        ]
        async with _client() as client:
            for disaster in itertools.cycle(disasters):
                await asyncio.sleep(every_s * self._random.uniform(0.5, 1.5))
                while (await client.get(self._url + "/readyz")).status_code != 200:  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.2)
                if isinstance(disaster, str):
                    media = noise(*POISON[disaster], seed=self._random.randrange(1 << 30))
                    await self._expect(client, f"poison ({disaster})", media, {500, 503, 504}, {})
                elif pids := procfs.of_kind(self._front, disaster[0]):
                    with contextlib.suppress(ProcessLookupError):  # another disaster was faster
                        os.kill(self._random.choice(pids), disaster[1])
                        self.counts[f"{disaster[0]}s hit by {disaster[1].name}"] += 1

    async def crashes(self, every_s: float) -> None:
        """Send images that end the process that decodes them."""
        async with _client() as client:
            while True:
                await asyncio.sleep(every_s * self._random.uniform(0.5, 1.5))
                media = noise(64, 64, self._random.randrange(1 << 30)) + DECODER_CRASH
                await self._expect(client, "decoders crashed", media, {400, 429, 503, 504}, {})

    async def garbage(self, every_s: float) -> None:
        """Send what is no image: half a file, noise, nothing."""
        async with _client() as client:
            while True:
                await asyncio.sleep(every_s * self._random.uniform(0.5, 1.5))
                whole = noise(64, 64, 1)
                media = self._random.choice([whole[: len(whole) // 2], self._random.randbytes(500), b"\0"])
                await self._expect(client, "undecodable media", media, {400, 429, 503}, {})

    async def slow_media(self, every_s: float) -> None:
        """Have it fetch from a server that trickles one byte at a time."""

        async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 100000\r\n\r\n")
                while not writer.is_closing():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.2)
            except OSError:
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, _client() as client:
            while True:
                await asyncio.sleep(every_s * self._random.uniform(0.5, 1.5))
                body = {"modality": "image", "mm_items": [f"http://127.0.0.1:{port}/slow.png"]}
                await self._count("slow media", client.post(self._url + "/encode", json=body), {400, 429, 503, 504})

    async def destinations(self, every_s: float) -> None:
        """Push to a receiver that vanishes now and then, before or in the middle."""
        context = zmq.asyncio.Context()
        async with _client() as client:
            while True:
                await asyncio.sleep(every_s * self._random.uniform(0.5, 1.5))
                socket = context.socket(zmq.PULL)
                port = socket.bind_to_random_port("tcp://127.0.0.1")
                push = {"prefill_host": "127.0.0.1", "embedding_port": str(port)}
                media = noise(112, 112, self._random.randrange(1 << 30))
                sending = asyncio.create_task(self._expect(client, "push", media, {200, 429, 502, 503, 504}, push))
                if self._random.random() < 0.5:
                    await asyncio.sleep(self._random.uniform(0, 0.1))
                    socket.close(linger=0)
                    self.counts["destinations killed"] += 1
                await sending
                socket.close(linger=0)

    async def leavers(self, every_s: float) -> None:
        """Ask for an encode and hang up before the answer."""
        while True:
            await asyncio.sleep(every_s * self._random.uniform(0.5, 1.5))
            async with _client() as client:
                media = noise(448, 448, self._random.randrange(1 << 30))
                files = {"file": ("p.png", media)}
                asking = asyncio.create_task(
                    client.post(self._url + "/encode", data={"modality": "image"}, files=files)
                )
                await asyncio.sleep(self._random.uniform(0, 0.2))
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                self.counts["clients gone"] += 1

    async def _expect(
        self, client: httpx.AsyncClient, name: str, media: bytes, expected: set[int], fields: dict[str, str]
    ) -> None:
        post = client.post(self._url + "/encode", data={"modality": "image"} | fields, files={"file": ("media", media)})
        await self._count(name, post, expected)

    async def _count(self, name: str, post: Awaitable[httpx.Response], expected: set[int]) -> None:
        try:
            response = await post
        except httpx.TransportError as error:
            self.surprises[f"{name}: {error!r}"] += 1
            return
        self.counts[name] += 1
        if response.status_code not in expected:
            self.surprises[f"{name}: {response.status_code} {response.text[:100]}"] += 1
