"""A rank: one process, one device. Receives commands in order, executes each, acknowledges it, and decides nothing.

With other ranks it executes one after another, because collectives have to come in one order; alone, several at once.

Started by `engine.launch` as `python -m encode_server.engine.rank`. Heavy imports happen after the hello, so that the
front knows at once that the process is up.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import mmap
import os
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import msgspec
import zmq

from encode_server.engine.profiler import Profiler
from encode_server.engine.side_by_side import SideBySide
from encode_server.errors import StartupError
from encode_server.runtime.leaving import leave
from encode_server.wire import ranks as m

if TYPE_CHECKING:
    import torch

    from encode_server.models.encoder import Encoder

PR_SET_PDEATHSIG = 1
NICE = 5  # of a rank on a CPU: the front, which shares its cores, needs them seldom, for moments, and at once
SMALL_BATCH = 1024  # patches or mel frames, of batches side by side on a CPU: small, so that they end alike
ON_A_CPU = 8  # batches at once, at most: beyond that Python's own part of a forward, one thread at a time, counts
ON_A_GPU = 2  # batches at once: while one computes, the other is copied in and out


class Channel:
    """The rank's end of its PAIR socket to the front."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: str) -> None:
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.linger = 1000
        self._socket.connect(f"ipc://{path}")
        self._posted: queue.SimpleQueue[m.Event] = queue.SimpleQueue()
        self._wake = os.eventfd(0)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def send(self, event: m.Event) -> None:
        self._socket.send(m.encode(event))

    def post(self, event: m.Event) -> None:
        """Have `receive` send it: for other threads, which must not touch the socket."""
        self._posted.put(event)
        os.eventfd_write(self._wake, 1)

    def receive(self) -> m.Command:
        """Wait for the next command, and send what is posted meanwhile."""
        while True:
            ready = dict(self._poller.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
                while not self._posted.empty():
                    self.send(self._posted.get())
            if self._socket in ready:
                return m.decode_command(self._socket.recv())

    def close(self) -> None:
        os.close(self._wake)
        self._socket.close()


class TensorStore:
    """The arena as this rank sees it: tensors over shared memory, not copied."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size)
        self._pinned: int | None = None

    def pin(self) -> None:
        """Have the current GPU copy to and from the arena directly, while it computes; takes all of its memory now.

        Copies from other memory go through a buffer of the driver's and make their thread wait. Raises RuntimeError
        where the driver refuses; the arena is as usable as before.
        """
        import torch

        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        code = torch.cuda.cudart().cudaHostRegister(address, len(self._map), 0)  # type: ignore[no-untyped-call]
        try:
            torch.cuda.check_error(code)
        except RuntimeError:
            with contextlib.suppress(RuntimeError):  # the runtime would say it once more, of the next kernel
                torch.zeros(1, device="cuda")
            raise
        self._pinned = address

    def close(self) -> None:
        """Undo `pin`. The map itself goes with the last tensor over it."""
        import torch

        if self._pinned is not None:
            torch.cuda.cudart().cudaHostUnregister(self._pinned)  # type: ignore[no-untyped-call]
            self._pinned = None

    def tensor(self, ref: m.TensorRef) -> torch.Tensor:
        import torch

        dtype = getattr(torch, ref.dtype)
        count = 1
        for extent in ref.shape:
            count *= extent
        if count == 0:
            return torch.empty(ref.shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=ref.offset).view(ref.shape)


class Worker:
    """An encoder of this rank and the arena it reads from and writes to."""

    def __init__(self, encoder: Encoder, store: TensorStore, rank: int) -> None:
        self._encoder, self._store, self._rank = encoder, store, rank

    def close(self) -> None:
        """Release the store; no forward may run any more."""
        self._store.close()

    def forward(self, command: m.Forward) -> m.Done | m.Failed:
        import torch

        try:
            started = time.perf_counter()
            items = [{ref.name: self._store.tensor(ref) for ref in item.inputs} for item in command.items]
            embeddings = self._encoder.forward(command.modality, items)
            self._synchronize()
            forwarded = time.perf_counter()
            if self._rank == 0:
                self._write(command, embeddings)
                self._synchronize()
            written = time.perf_counter()
        except torch.OutOfMemoryError as error:
            return self._failed(command, error, out_of_memory=True)
        except Exception as error:
            return self._failed(command, error)
        return m.Done(self._rank, command.seq, forward_s=forwarded - started, copy_s=written - forwarded)

    def _synchronize(self) -> None:
        """Wait until the device has done what this thread asked of it."""
        import torch

        if self._encoder.info.device != "cpu":
            torch.cuda.current_stream(self._encoder.info.device).synchronize()

    def _failed(self, command: m.Forward, error: Exception, *, out_of_memory: bool = False) -> m.Done | m.Failed:
        """The batch's failure; the rank's where it broke the CUDA context, in which nothing works any more."""
        import torch

        try:
            if self._encoder.info.device != "cpu":
                torch.cuda.synchronize(self._encoder.info.device)
                torch.cuda.empty_cache()
        except Exception as broken:
            return m.Failed(self._rank, _one_line(broken))
        return m.Done(self._rank, command.seq, error=_one_line(error), out_of_memory=out_of_memory)

    def _write(self, command: m.Forward, embeddings: list[torch.Tensor]) -> None:
        for item, embedding in zip(command.items, embeddings, strict=True):
            if tuple(embedding.shape) != item.output.shape:
                raise ValueError(f"embedding of shape {tuple(embedding.shape)}, expected {item.output.shape}")
            self._store.tensor(item.output).copy_(embedding, non_blocking=True)


def serve(channel: Channel, worker: Worker, profiler: Profiler, rank: int, threads: SideBySide | None) -> None:
    """Execute commands until `Shutdown`; forwards on `threads`, but for those that are profiled."""
    while True:
        match channel.receive():
            case m.Forward() as command if threads is not None and not profiler.running:
                threads.submit(partial(_forward_and_post, worker, command, channel))
            case m.Forward() as command:
                channel.send(worker.forward(command))
                with contextlib.suppress(Exception):  # a trace that cannot be written is no reason to fail an item
                    profiler.forwarded()
            case m.StartProfile(seq, path, forwards):
                channel.send(_attempt(rank, seq, lambda: profiler.start(f"{path}rank{rank}.json.gz", forwards)))
            case m.StopProfile(seq):
                channel.send(_attempt(rank, seq, profiler.stop))
            case m.Ping(seq):
                channel.send(m.Done(rank, seq))
            case m.Shutdown():
                return
            case m.Load():
                raise StartupError("the front sent Load to a loaded rank")


def load(command: m.Load, channel: Channel) -> tuple[Worker, m.EncoderInfo]:
    """Join the group and load the encoder. The front's first health probe warms it up."""

    def progress(step: str) -> None:
        channel.send(m.Progress(command.rank, step))

    progress("importing torch")
    import torch
    import torch.distributed as dist

    from encode_server.engine.device import resolve_device, resolve_dtype

    torch.set_num_threads(command.threads)
    device = resolve_device(command.device, command.rank)
    if device == "cpu":
        os.nice(NICE)
    else:
        torch.cuda.set_device(device)
    if command.world > 1:
        progress("joining the group")
        # A FileStore on the inherited memfd: torch's TCPStore would let any local user join, and a file could leak.
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            store=dist.FileStore(f"/proc/self/fd/{command.store_fd}", command.world),  # type: ignore[attr-defined]
            rank=command.rank,
            world_size=command.world,
            device_id=None if device == "cpu" else torch.device(device),  # connect now, not in the first forward
        )
    progress("loading weights")
    from encode_server.models.encoder import load_encoder

    encoder = load_encoder(
        command.path,
        device=device,
        dtype=resolve_dtype(command.dtype, command.checkpoint_dtype, device),
        rank=command.rank,
        world=command.world,
    )
    if device != "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # of the weights' way to the device: what was freed is kept otherwise
    info = encoder.info
    if command.world == 1:
        at_once = min(command.threads, ON_A_CPU) if device == "cpu" else ON_A_GPU
        small = SMALL_BATCH if device == "cpu" and at_once > 1 else None
        info = msgspec.structs.replace(info, at_once=at_once, batch_cost=small)
    store = TensorStore(command.arena_fd, command.arena_bytes)
    if device != "cpu":
        progress("pinning the arena")
        try:
            store.pin()
        except RuntimeError as error:
            progress(f"the arena is not pinned, copies will wait for the device: {_one_line(error)}")
    return Worker(encoder, store, command.rank), info


def _forward_and_post(worker: Worker, command: m.Forward, channel: Channel) -> None:
    channel.post(worker.forward(command))


@contextlib.contextmanager
def _side_by_side(info: m.EncoderInfo, cores: int) -> Iterator[SideBySide | None]:
    if info.at_once == 1:
        yield None
        return

    def own_stream() -> None:
        import torch

        if info.device != "cpu":
            # Of this thread; it sets its device too.
            torch.cuda.set_stream(torch.cuda.Stream(info.device))  # type: ignore[no-untyped-call]

    threads = SideBySide(info.at_once, cores, own_stream)
    try:
        yield threads
    finally:
        threads.close()


@contextlib.contextmanager
def _joined_group() -> Iterator[None]:
    yield
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


def _attempt(rank: int, seq: int, action: Callable[[], None]) -> m.Done:
    try:
        action()
    except (ValueError, OSError, RuntimeError) as error:
        return m.Done(rank, seq, error=str(error).strip().split("\n", 1)[0] or type(error).__name__)
    return m.Done(rank, seq)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


def _die_with(parent: int) -> None:
    """Ask the kernel to kill this process when the front dies, however it dies."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        sys.exit(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="encode_server.engine.rank")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    _die_with(args.parent)
    for signum in (signal.SIGINT, signal.SIGTERM):  # for the front, which shuts its ranks down when work has ended
        signal.signal(signum, signal.SIG_IGN)

    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel = Channel(context, args.socket)
    try:
        channel.send(m.Hello(args.rank))
        command = channel.receive()
        if not isinstance(command, m.Load):
            return 0
        with _joined_group(), contextlib.ExitStack() as freed:
            worker, info = load(command, channel)
            freed.callback(worker.close)
            gc.freeze()  # what is loaded stays: a collection that walks through it would idle the device
            channel.send(m.Ready(args.rank, info))
            with _side_by_side(info, command.threads) as threads:
                serve(channel, worker, Profiler(info.device), args.rank, threads)
    except StartupError as error:
        channel.send(m.Failed(args.rank, str(error)))
        return 3
    except Exception as error:
        channel.send(m.Failed(args.rank, _one_line(error)))
        raise
    finally:
        channel.close()
        context.term()
    return 0


if __name__ == "__main__":
    leave(main())
