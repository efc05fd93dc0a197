"""One embedding after another from the server's delivery code to a receiver in another process, by every transport.

`python -m benchmarks.transports [--origin …] [--json FILE]`: GB/s, processor time of both sides for each embedding, and
how late the sender's loop was at worst. Loopback; what is not installed is left out.

`--origin`, where an embedding comes from: `cache`: one item on the heap; `arena`: one item that is copied out of the
ranks' memory, and that nothing else keeps; `items`: four items on the heap.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
import uvloop
import zmq
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

from encode_server.api import answers
from encode_server.client import EmbeddingReceiver
from encode_server.delivery.base import Part
from encode_server.delivery.folder import ENTRY, EntryFolder
from encode_server.delivery.mooncake import MooncakeEngine
from encode_server.delivery.native import NativePush
from encode_server.delivery.nixl import NixlAgent
from encode_server.delivery.push import Pusher
from encode_server.delivery.store import TENSOR, EmbeddingStore
from encode_server.errors import StartupError
from encode_server.runtime.pools import Pace, Pools, run, run_sized
from encode_server.wire.embedding import Encoded, EncodedItem, OutgoingRoom, releasing
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality

SIZES = {"0.1 MB": (100, 200), "1 MB": (1000, 100), "8 MB": (8000, 30), "60 MB": (60_000, 8)}
"""By name: kilobytes, and how many embeddings."""

DIM = 250  # float32: a row is a kilobyte
POOL_BYTES = 256 << 20  # registered once
WARM = 3  # embeddings before the measured ones
TIMEOUT_S = 60.0


@dataclass
class Figures:
    """Of one transport and size. Seconds, bytes."""

    seconds: float
    nbytes: int
    count: int
    sender_cpu_s: float
    receiver_cpu_s: float
    lag_s: float

    def document(self) -> dict[str, float]:
        """As the table shows it."""
        return {
            "gb_per_s": self.nbytes * self.count / self.seconds / 1e9,
            "sender_ms": self.sender_cpu_s / self.count * 1e3,
            "receiver_ms": self.receiver_cpu_s / self.count * 1e3,
            "lag_ms": self.lag_s * 1e3,
        }


def made(kilobytes: int, items: int) -> Encoded:
    """An embedding of random values, in so many items."""
    values = np.random.default_rng(0).random((kilobytes, DIM), np.float32)
    return Encoded(Modality.IMAGE, "m", "float32", DIM, [_item(part) for part in np.array_split(values, items)])


def _item(values: np.ndarray[Any, Any]) -> EncodedItem:
    return EncodedItem(ItemInfo(len(values), None, "sha256:0"), {}, values.reshape(-1).view(np.uint8).data)


async def copied_out(pools: Pools, encoded: Encoded, room: OutgoingRoom | None) -> Encoded:
    """The embedding as `Job.copy_embedding` gives it: in `room`, where there is room, else on the heap."""
    (item,) = encoded.items

    def copy() -> memoryview:
        there = room.copy(item.data) if room is not None else None
        return np.frombuffer(item.data, np.uint8).copy().data if there is None else there

    return replace(encoded, items=[replace(item, data=await run_sized(pools.send, Pace.COPY, encoded.nbytes, copy))])


# The receiver's process. Each command is a number of embeddings; the answer is the processor time that they took.


def receive(transport: str, pipe: Connection) -> None:
    """The receiver of one transport, until the pipe closes."""
    with contextlib.suppress(EOFError):
        if transport == "http":
            _get(pipe)
        elif transport == "mooncake":
            _land(pipe)
        elif transport == "store":
            _read(pipe)
        else:
            asyncio.run(_take(pipe, nixl=transport == "nixl"))


def _get(pipe: Connection) -> None:
    url = pipe.recv()
    with httpx.Client(timeout=TIMEOUT_S) as client:
        while True:
            count = pipe.recv()
            began = time.process_time()
            for _ in range(count):
                client.get(url).raise_for_status()
            pipe.send(time.process_time() - began)


def _land(pipe: Connection) -> None:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "")
    room = np.zeros(max(kilobytes for kilobytes, _ in SIZES.values()) * 1000, np.uint8)
    engine.register_memory(room.ctypes.data, room.nbytes)
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        pipe.send((port, f"127.0.0.1:{engine.get_rpc_port()}", room.ctypes.data))
        while True:
            count = pipe.recv()
            began = time.process_time()
            for _ in range(count):
                socket.recv()
            pipe.send(time.process_time() - began)


def _read(pipe: Connection) -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        pipe.send(port)
        while True:
            count = pipe.recv()
            began = time.process_time()
            for _ in range(count):
                entry = Path(socket.recv().decode())
                assert load_file(entry / ENTRY)[TENSOR].size
                shutil.rmtree(entry)
            pipe.send(time.process_time() - began)


async def _take(pipe: Connection, *, nixl: bool) -> None:
    async with EmbeddingReceiver(nixl=nixl) as receiver:
        pipe.send(receiver.port)
        while True:
            count = await asyncio.to_thread(pipe.recv)
            began = time.process_time()
            for number in range(count):
                await receiver.receive(str(number), timeout=TIMEOUT_S)
            pipe.send(time.process_time() - began)


# The sender's side.

Send = Callable[[Encoded, int], Awaitable[None]]


@contextlib.asynccontextmanager
async def sender(transport: str, pipe: Connection, pools: Pools, origin: str) -> AsyncIterator[Send | None]:
    """Sends one embedding, by its number. None where the receiver asks for it (HTTP)."""
    if transport == "http":
        async with _http(pipe):
            yield None
        return
    pusher = Pusher(TIMEOUT_S)
    agent: NixlAgent | None = None
    engine: MooncakeEngine | None = None
    folder: Path | None = None
    try:
        if transport == "mooncake":
            engine = MooncakeEngine("127.0.0.1", "tcp", "", POOL_BYTES)
            port, session, address = await asyncio.to_thread(pipe.recv)
            writer = engine

            async def write(encoded: Encoded, number: int) -> None:
                if origin == "arena":
                    encoded = await copied_out(pools, encoded, writer.room)
                place = encoded.contiguous, writer.room
                with releasing(await run_sized(pools.send, Pace.COPY, encoded.nbytes, *place)) as data:
                    await writer.write(session, address, data)
                await pusher.push(f"tcp://127.0.0.1:{port}", [b"header"])

            yield write
            return
        if transport == "store":
            port = await asyncio.to_thread(pipe.recv)
            root = folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
            store = EmbeddingStore(EntryFolder(str(root), max_bytes=1 << 30, max_age_s=600), 600, pools.store)

            async def put(encoded: Encoded, number: int) -> None:
                await store.delivery([f"n{number}"]).deliver(Part(str(number), 0, 1, Modality.IMAGE, "m"), encoded)
                await pusher.push(f"tcp://127.0.0.1:{port}", [str(root / f"n{number}").encode()])

            yield put
            return
        if transport == "nixl":
            agent = NixlAgent(POOL_BYTES)
        push = NativePush(pusher, f"tcp://127.0.0.1:{await asyncio.to_thread(pipe.recv)}", pools.send, agent)

        async def deliver(encoded: Encoded, number: int) -> None:
            if origin == "arena":
                encoded = await copied_out(pools, encoded, agent.room if agent is not None else None)
            await push.deliver(Part(str(number), 0, 1, Modality.IMAGE, "m"), encoded)

        yield deliver
    finally:
        for each in (agent, engine):
            if each is not None:
                each.close()
        pusher.close()
        if folder is not None:
            shutil.rmtree(folder)


SERVED: dict[str, Encoded] = {}


@contextlib.asynccontextmanager
async def _http(pipe: Connection) -> AsyncIterator[None]:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = answers.safetensors_body("r", SERVED["now"])
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", str(body.size).encode())],
            }
        )
        sent = 0
        for piece in body.pieces:
            sent += len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": sent < body.size})

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    pipe.send(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/")
    yield
    server.should_exit = True
    await task


async def measure(send: Send | None, pipe: Connection, encoded: Encoded, count: int) -> Figures:
    """So many embeddings, one after another."""
    SERVED["now"] = encoded

    async def some(number: int) -> float:
        pipe.send(number)
        if send is not None:
            for index in range(number):
                await send(encoded, index)
        return float(await asyncio.to_thread(pipe.recv))

    await some(WARM)
    late: list[float] = []
    lag = asyncio.create_task(_lag(late))
    cpu, began = time.process_time(), time.perf_counter()
    receiver_cpu_s = await some(count)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    lag.cancel()
    return Figures(seconds, encoded.nbytes, count, cpu, receiver_cpu_s, max(late, default=0.0))


async def _lag(late: list[float]) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + 0.005
        await asyncio.sleep(0.005)
        late.append(loop.time() - due)


async def run_all(transports: list[str], origin: str) -> dict[str, dict[str, dict[str, float]]]:
    """Every transport with every size; by transport, then size."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    start = multiprocessing.get_context("spawn")
    pools = Pools(4)
    for transport in transports:
        near, far = start.Pipe()
        child = start.Process(target=receive, args=(transport, far), daemon=True)
        child.start()
        far.close()
        try:
            async with sender(transport, near, pools, origin) as send:
                found[transport] = {}
                for name, (kilobytes, count) in SIZES.items():
                    encoded = await run(pools.work, made, kilobytes, 4 if origin == "items" else 1)
                    found[transport][name] = (await measure(send, near, encoded, count)).document()
        except (StartupError, EOFError) as error:
            print(f"{transport}: {error}", file=sys.stderr)
        finally:
            near.close()
            child.join(5)
            child.kill()
    pools.close()
    return found


def show(console: Console, found: dict[str, dict[str, dict[str, float]]]) -> None:
    """The table of docs/transports.md."""
    table = Table(title="loopback, one after another")
    for column in ("transport", "size", "GB/s", "sender CPU ms", "receiver CPU ms", "loop late ms"):
        table.add_column(column, justify="right" if column not in ("transport", "size") else "left")
    for transport, sizes in found.items():
        for size, figures in sizes.items():
            table.add_row(transport, size, *(f"{figures[name]:.2f}" for name in figures))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.transports", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--transports", default="http,zmq,store,mooncake,nixl")
    parser.add_argument("--origin", choices=("cache", "arena", "items"), default="cache")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = uvloop.run(run_all(arguments.transports.split(","), arguments.origin))
    show(Console(width=110), found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
