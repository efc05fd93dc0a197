"""A preparer that does what the media's bytes say, in the place of `encode_server.prepare.worker`.

The bytes are words: `crash`, `exit`, `memory`, `bad` and `hang` end so, in the order in which the words stand. `NUMBER`
is the size of the item's tensor in bytes, filled with the item's first byte; 256 without one. `wait:PATH` waits until
the file exists. `once:PATH` obeys the words after it the first time only: it makes the file.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import msgspec
import zmq

from encode_server.runtime.channel import Channel
from encode_server.wire import preparers as m
from encode_server.wire.layout import aligned


class Refusal(Exception):
    """The item ends in an error of its caller's."""

    def __init__(self, code: str, *, out_of_memory: bool = False) -> None:
        super().__init__(code)
        self.code, self.out_of_memory = code, out_of_memory


def obey(media: bytes) -> bytes:
    """The item's tensor."""
    size = 256
    for word in media.decode().split():
        name, _, path = word.partition(":")
        match name:
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(7)
            case "hang":
                time.sleep(3600)
            case "memory":
                raise Refusal("internal", out_of_memory=True)
            case "bad":
                raise Refusal("bad_media")
            case "wait":
                Path(path + ".begun").touch()
                while not Path(path).exists():
                    time.sleep(0.002)
            case "once":
                if Path(path).exists():
                    break
                Path(path).touch()
            case _ if name.isdigit():
                size = int(name)
    return media[:1] * size


class FakeWorker:
    """The jobs of one process."""

    def __init__(self, setup: m.PreparerSetup, arena: mmap.mmap) -> None:
        self._arena = arena
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._channel = Channel(self._context, setup.socket)
        self._pool, self._express = ThreadPoolExecutor(setup.threads), ThreadPoolExecutor(1)
        self._copies = ThreadPoolExecutor(1)
        self._lock = Lock()
        self._wanted: set[int] = set()
        self._held: dict[int, bytes] = {}
        # While this file exists, copies do not begin.
        self._slow_copy = Path(setup.path) / "slow_copy"

    def serve(self) -> None:
        """Until `Shutdown`."""
        self._channel.send(m.encode(m.Ready()))
        while True:
            frames = self._channel.receive()
            match m.decode_command(frames[0]):
                case m.Prepare(job, express=express):
                    with self._lock:
                        self._wanted.add(job)
                    (self._express if express else self._pool).submit(self._prepare, job, frames[1])
                case m.Place(job, offset):
                    self._copies.submit(self._place, job, self._held.pop(job), offset)
                case m.Drop(job):
                    with self._lock:
                        self._wanted.discard(job)
                        self._held.pop(job, None)
                case m.Pickle(job):
                    self._channel.send(m.encode(m.Pickled(job, b"dtype", None, None)))
                case m.Shutdown():
                    return

    def _prepare(self, job: int, media: bytes) -> None:
        try:
            tensor = obey(media)
        except Refusal as refusal:
            self._channel.post(m.encode(m.Refused(job, refusal.code, str(refusal), refusal.out_of_memory)))
            return
        with self._lock:
            wanted = job in self._wanted
            if wanted:
                self._held[job] = tensor
        if not wanted:
            self._channel.post(m.encode(m.Refused(job, "gone", "nobody wants the item any more")))
            return
        part = m.TensorPart("x", "uint8", (len(tensor),), 0)
        piece = m.PreparedPiece((part,), 1, 1, 0)
        item = m.PreparedItem((piece,), aligned(len(tensor)), None, {"pid": os.getpid()})
        self._channel.post(m.encode(m.Prepared(job, item, 0.0, 0.0)))

    def _place(self, job: int, tensor: bytes, offset: int) -> None:
        if self._slow_copy.exists():
            Path(f"{self._slow_copy}.begun").touch()
        while self._slow_copy.exists():
            time.sleep(0.002)
        self._arena[offset : offset + len(tensor)] = tensor
        self._channel.post(m.encode(m.Placed(job, 0.0)))


def main(argument: bytes, fds: Sequence[int]) -> int:
    """As `encode_server.prepare.worker.main`."""
    setup = msgspec.msgpack.decode(argument, type=m.PreparerSetup)
    if (failure := Path(setup.path) / "cannot_load").exists():
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        channel = Channel(context, setup.socket)
        channel.send(m.encode(m.Failed(failure.read_text())))
        channel.close()
        context.term()
        return 3
    if (Path(setup.path) / "dies_early").exists():
        return 9
    if (once := Path(setup.path) / "stops_early").exists():
        once.unlink()
        os.kill(os.getpid(), signal.SIGSTOP)
    FakeWorker(setup, mmap.mmap(fds[0], setup.arena_bytes)).serve()
    return 0
