"""A server with faults to order, load that knows what it lost, and who may be killed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from encode_server.client import EncodeClient, EncodeServerError
from tests.live import LiveServer

FAULTS = str(Path(__file__).parents[2] / "benchmarks" / "faults")


def start(checkpoint, tmp, *options, faults=True, environment=None):
    """A server without a cache; with `faults` it takes those of benchmarks/faults."""
    environment = environment or ({"PYTHONPATH": FAULTS} if faults else {})
    return LiveServer(checkpoint, tmp, "--cache-gb", "0", *options, environment=environment)


async def encode_all(server, media):
    """Each item as a request of its own; its embedding, or the error."""
    async with EncodeClient(server.base_url) as client:

        async def ask(item):
            while True:
                try:
                    return await client.encode([item], "image", timeout_s=300)
                except EncodeServerError as error:
                    # Refused at the door while ranks restart: it has not been accepted, so ask again.
                    if error.status != 503 or error.retry_after is None or server.process.poll() is not None:
                        raise
                    if "stopping" in error.message:
                        raise
                    await asyncio.sleep(0.2)

        return await asyncio.gather(*map(ask, media), return_exceptions=True)


async def until_in_work(server) -> None:
    """Return once a batch is being encoded."""
    async with httpx.AsyncClient(timeout=60) as client:
        while "\nencode_batches_in_flight 0.0\n" in (await client.get(server.base_url + "/metrics")).text:
            pass


def all_equal(results, reference, media) -> bool:
    """Whether every item was answered with the embedding that transformers computes."""
    assert not [str(result) for result in results if isinstance(result, Exception)]
    return all(
        abs(result.numpy() - reference.image(item)).max() <= 1e-4 for result, item in zip(results, media, strict=True)
    )


class Load:
    """Clients that ask for images one after another, each its next as soon as it has its last, until `stop`."""

    def __init__(self, server, media, clients: int = 4) -> None:
        self._server, self._media, self._clients = server, media, clients
        self._stop = False
        self.answered = 0
        self.lost: list[str] = []
        self.last = dict[int, object]()  # by index of the image, its last embedding

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._ask(number)) for number in range(self._clients)]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def _ask(self, number: int) -> None:
        index = number
        while not self._stop:
            index = (index + self._clients) % len(self._media)
            (result,) = await encode_all(self._server, [self._media[index]])
            if isinstance(result, Exception):
                self.lost.append(repr(result))
            else:
                self.answered += 1
                self.last[index] = result

    async def progress(self, answers: int) -> None:
        """Return once so many more have been answered."""
        wanted = self.answered + answers
        async with asyncio.timeout(120):
            while self.answered < wanted:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    def right(self, reference) -> bool:
        """Whether nothing was lost, and the last answers are what transformers computes."""
        assert not self.lost
        indexes = sorted(self.last)
        return all_equal([self.last[i] for i in indexes], reference, [self._media[i] for i in indexes])
