"""The preparer process: decodes and preprocesses media on a pool of threads, and copies the tensors into the arena.

A preparer needs neither the network nor the disk once it is loaded, and may die at any moment: whatever it held is
prepared again by another one. The forkserver runs `main` in a child.
"""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import msgspec
import numpy as np
import torch
import zmq

from encode_server.errors import EncodeError, StartupError, TooLarge, first_line
from encode_server.media.limits import MediaLimits
from encode_server.models import on_device
from encode_server.models.prepared import Prepared
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import open_directory
from encode_server.prepare import torch_pickles
from encode_server.prepare.confine import confine
from encode_server.prepare.memory import DecodeMemory
from encode_server.runtime.channel import Channel
from encode_server.runtime.pools import SMALL_COPY
from encode_server.wire import preparers as m
from encode_server.wire.layout import aligned


class ArenaWriter:
    """The arena as this preparer sees it: bytes to copy tensors to."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size)
        os.close(fd)

    def write(self, tensors: Sequence[torch.Tensor], offset: int) -> None:
        """Copy the tensors in, one after another, each aligned, beginning at byte `offset`."""
        for tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if size:
                source = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                np.copyto(np.frombuffer(self._map, np.uint8, size, offset), source)
            offset += aligned(size)


class Worker:
    """The jobs of one preparer. `serve` runs on the main thread, which alone touches the socket."""

    def __init__(
        self,
        preprocessor: Preprocessor,
        arena: ArenaWriter,
        channel: Channel,
        setup: m.PreparerSetup,
    ) -> None:
        self._preprocessor, self._arena, self._channel = preprocessor, arena, channel
        self._memory = DecodeMemory(setup.memory_bytes)
        self._pool = ThreadPoolExecutor(setup.threads, "prepare")
        self._express = ThreadPoolExecutor(1, "express")
        # Not on `_pool`: the front waits for each copy, and would wait for the decoders ahead of it, too.
        self._copies = ThreadPoolExecutor(1, "copy")
        self._lock = Lock()
        self._started: dict[int, Future[None]] = {}
        self._held: dict[int, list[torch.Tensor]] = {}

    def serve(self) -> None:
        """Execute commands until `Shutdown`."""
        while True:
            frames = self._channel.receive()
            match m.decode_command(frames[0]):
                case m.Prepare() as command:
                    pool = self._express if command.express else self._pool
                    with self._lock:
                        self._started[command.job] = pool.submit(self._prepare, command, frames[1])
                case m.Place(job, offset):
                    tensors = self._held.pop(job)
                    if sum(map(_nbytes, tensors)) <= SMALL_COPY:
                        self._place(job, tensors, offset)
                    else:
                        self._copies.submit(self._place, job, tensors, offset)
                case m.Drop(job):
                    self._drop(job)
                case m.Pickle() as command:
                    self._channel.send(m.encode(torch_pickles.make(command)))
                case m.Shutdown():
                    return

    def _prepare(self, command: m.Prepare, media: bytes) -> None:
        started = decoded = time.thread_time()

        def on_decoded() -> None:
            nonlocal decoded
            decoded = time.thread_time()

        out_of_memory = False
        try:
            with self._charged(command, media):
                prepared = self._preprocessor.prepare(command.modality, media, command.options, on_decoded)
            item, tensors = described(prepared, self._preprocessor.split(prepared, command.max_cost))
        except EncodeError as error:
            code, message = error.code, error.message
            out_of_memory = _is_memory(error.__cause__)
        except Exception as error:
            code, message = "internal", f"{type(error).__name__}: {first_line(error)}"
            if out_of_memory := _is_memory(error):
                code, message = TooLarge.code, "preprocessing it needs more memory than there is"
        else:
            ended = time.thread_time()
            if self._keep(command.job, tensors):
                prepared_message = m.Prepared(command.job, item, decoded - started, ended - decoded)
                self._channel.post(m.encode(prepared_message))
            else:
                self._post_dropped(command.job)
            return
        with self._lock:
            self._started.pop(command.job, None)
        if out_of_memory:
            gc.collect()  # what the failed item still holds in reference cycles
        self._channel.post(m.encode(m.Refused(command.job, code, message, out_of_memory)))

    def _charged(self, command: m.Prepare, media: bytes) -> contextlib.AbstractContextManager[None]:
        """Hold the memory of the decode. Probes are tiny, and wait for nobody."""
        if command.express:
            return contextlib.nullcontext()
        nbytes = self._preprocessor.decoded_bytes(command.modality, media, command.options)
        waiting, began = m.encode(m.Waiting(command.job)), m.encode(m.Began(command.job))
        return self._memory.hold(nbytes, lambda: self._channel.post(waiting), lambda: self._channel.post(began))

    def _keep(self, job: int, tensors: list[torch.Tensor]) -> bool:
        """Keep a job's tensors until they are asked for; False when the job was dropped meanwhile."""
        with self._lock:
            if self._started.pop(job, None) is None:
                return False
            self._held[job] = tensors
            return True

    def _post_dropped(self, job: int) -> None:
        """Tell the front that a dropped job no longer takes a thread."""
        self._channel.post(m.encode(m.Refused(job, "gone", "nobody wants the item any more")))

    def _drop(self, job: int) -> None:
        with self._lock:
            future = self._started.pop(job, None)
            self._held.pop(job, None)
        if future is not None and future.cancel():
            self._post_dropped(job)

    def _place(self, job: int, tensors: list[torch.Tensor], offset: int) -> None:
        started = time.thread_time()
        self._arena.write(tensors, offset)
        self._channel.post(m.encode(m.Placed(job, time.thread_time() - started)))


def described(prepared: Prepared, pieces: Sequence[Prepared]) -> tuple[m.PreparedItem, list[torch.Tensor]]:
    """What the front is told of an item, and the item's tensors in the order in which they will lie in the arena."""
    described, tensors, offset = [], [], 0
    for piece in pieces:
        parts = []
        for name, tensor in piece.tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            parts.append(m.TensorPart(name, dtype, tuple(tensor.shape), offset))
            tensors.append(tensor)
            offset += aligned(_nbytes(tensor))
        described.append(m.PreparedPiece(tuple(parts), piece.tokens, piece.cost, piece.pairs))
    return m.PreparedItem(tuple(described), offset, prepared.grid_thw, dict(prepared.extra)), tensors


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def main(argument: bytes, fds: Sequence[int]) -> int:
    """Load the processors, give up what decoding does not need, and serve."""
    setup = msgspec.msgpack.decode(argument, type=m.PreparerSetup)
    limits = msgspec.msgpack.decode(setup.limits, type=MediaLimits)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel = Channel(context, setup.socket)
    what = "the checkpoint's processors cannot be loaded"
    try:
        torch.set_num_threads(1)  # parallel over items, and the cores are the ranks'
        checkpoint = open_directory(Path(setup.path), name=setup.name)
        # Before `confine`: a GPU's context reserves more addresses than any memory limit allows.
        device = on_device.choose(setup.device, setup.index)
        preprocessor = Preprocessor(
            checkpoint, limits, setup.max_item_tokens, device, lambda message: channel.post(m.encode(m.Warned(message)))
        )
        arena = ArenaWriter(fds[0], setup.arena_bytes)
        gc.freeze()
        confine(setup.memory_bytes)
        what = "a preparer failed"
        channel.send(m.encode(m.Ready()))
        Worker(preprocessor, arena, channel, setup).serve()
    except StartupError as error:
        channel.send(m.encode(m.Failed(str(error))))
        return 3
    except Exception as error:
        channel.send(m.encode(m.Failed(f"{what}: {type(error).__name__}: {first_line(error)}")))
        return 4
    finally:
        channel.close()
        context.term()
    return 0
