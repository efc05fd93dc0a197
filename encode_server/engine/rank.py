"""A rank: one process, one device. Receives commands in order, executes each, acknowledges it, and decides nothing.

With other ranks, a rank executes one command after another, because collectives have to come in one order; alone, it
executes several forwards concurrently.

The forkserver runs `main` in a child.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import msgspec
import torch
import torch.distributed as dist
import zmq

from encode_server.engine import device as devices
from encode_server.engine.device import resolve_device, resolve_dtype
from encode_server.engine.lane import Lane
from encode_server.engine.profiler import Profiler
from encode_server.engine.side_by_side import SideBySide
from encode_server.errors import StartupError, first_line
from encode_server.models.encoder import Encoder, load_encoder
from encode_server.models.out_of_memory import is_out_of_memory
from encode_server.runtime.channel import Channel
from encode_server.runtime.tracebacks import let_go
from encode_server.wire import ranks as m

NICE = 5  # of a rank on a CPU: the front runs rarely and briefly on the same cores, but must run immediately
SMALL_BATCH = 1024  # patches or mel frames, of batches side by side on a CPU: small, so that they end alike
# A core for each: less is done in some 15 ms, and takes longer in two parts that wait for each other.
CORE_FLOPS = 1e9
ON_A_CPU = 8  # most concurrent batches: beyond that, Python's own part of a forward, one thread at a time, counts
MEMORY_S = 2.0  # between two answers that say how much of the device's memory is used
ON_A_GPU = 2  # batches in progress: while one computes, the other is launched, and its embeddings are copied out


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
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        devices.pin(address, len(self._map))
        self._pinned = address

    def close(self) -> None:
        """Undo `pin`. The map itself goes with the last tensor over it."""
        if self._pinned is not None:
            devices.unpin(self._pinned)
            self._pinned = None

    def tensor(self, ref: m.TensorRef) -> torch.Tensor:
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
        self._lane = None if encoder.info.device == "cpu" else Lane(encoder.info.device)
        self._memory_said = -math.inf

    @property
    def info(self) -> m.EncoderInfo:
        """What was loaded."""
        return self._encoder.info

    def most_cores(self, command: m.Forward) -> int:
        """How many cores of a CPU the batch is worth: each weight is used once for each patch or mel frame."""
        info = self._encoder.info
        weights: float = info.weight_bytes / getattr(torch, info.dtype).itemsize
        return math.ceil(2 * weights * sum(item.cost for item in command.items) / CORE_FLOPS)

    def close(self) -> None:
        """Release the store; no forward may run any more."""
        self._store.close()

    def forward(self, command: m.Forward) -> m.Done | m.Failed:
        """Encode one batch. The batch's failure is in the answer; `Failed` where the rank cannot go on."""
        done = self._attempt(command)
        if not done.error:
            return done
        # Only now, when the exception is gone: its traceback held the activations of the layers that had run.
        try:
            if self._encoder.info.device != "cpu":
                devices.recover(self._encoder.info.device)
        except Exception as broken:  # the error broke the context, in which nothing works any more
            return m.Failed(self._rank, _one_line(broken))
        return done

    def _attempt(self, command: m.Forward) -> m.Done:
        try:
            items = [{ref.name: self._store.tensor(ref) for ref in item.inputs} for item in command.items]
            forward = partial(self._encoder.forward, command.modality, items)
            write = partial(self._write, command)
            forward_s = _run_here(forward, write) if self._lane is None else self._lane.run(forward, write)
        except Exception as error:
            done = m.Done(self._rank, command.seq, _one_line(error), is_out_of_memory(error))
            let_go(error)
            return done
        return m.Done(self._rank, command.seq, forward_s=forward_s, memory=self.memory())

    def memory(self) -> m.DeviceMemory | None:
        """What is used of the device's memory, not more often than every `MEMORY_S`: else, and on a CPU, None."""
        now = time.monotonic()
        if self._encoder.info.device == "cpu" or now - self._memory_said < MEMORY_S:
            return None
        self._memory_said = now
        return devices.memory_of(self._encoder.info.device)

    def _write(self, command: m.Forward, embeddings: list[torch.Tensor]) -> None:
        """Queue the copies of the embeddings into the arena, on rank 0."""
        if self._rank != 0:
            return
        for item, embedding in zip(command.items, embeddings, strict=True):
            if tuple(embedding.shape) != item.output.shape:
                raise ValueError(f"embedding of shape {tuple(embedding.shape)}, expected {item.output.shape}")
            self._store.tensor(item.output).copy_(embedding, non_blocking=True)


def _run_here(forward: Callable[[], list[torch.Tensor]], write: Callable[[list[torch.Tensor]], None]) -> float:
    """As `Lane.run`, on a CPU."""
    started = time.perf_counter()
    embeddings = forward()
    forward_s = time.perf_counter() - started
    write(embeddings)
    return forward_s


def serve(channel: Channel, worker: Worker, profiler: Profiler, rank: int, threads: SideBySide | None) -> None:
    """Execute commands until `Shutdown`; forwards on `threads`, but for those that are profiled."""
    while True:
        match m.decode_command(channel.receive()[0]):
            case m.Forward() as command if threads is not None and not profiler.running:
                threads.submit(partial(_forward_and_post, worker, command, channel), worker.most_cores(command))
            case m.Forward() as command:
                channel.send(m.encode(worker.forward(command)))
                with contextlib.suppress(Exception):  # a profile that fails is no reason to lose the rank
                    profiler.forwarded()
            case m.StartProfile(seq, path, forwards):
                start = partial(profiler.start, f"{path}rank{rank}.json.gz", forwards)
                channel.send(m.encode(_attempt(rank, seq, start)))
            case m.StopProfile(seq):
                channel.send(m.encode(_attempt(rank, seq, profiler.stop)))
            case m.Ping(seq):
                channel.send(m.encode(m.Done(rank, seq, memory=worker.memory())))
                with contextlib.suppress(Exception):
                    profiler.look()
            case m.Shutdown():
                return


def load(
    setup: m.RankSetup,
    arena_fd: int,
    store_fd: int,
    progress: Callable[[str], None],
    warn: Callable[[str], None],
) -> Worker:
    """Join the group and load the encoder. The front's first health probe warms the encoder up."""
    torch.set_num_threads(setup.threads)
    device = resolve_device(setup.device, setup.device_index, setup.devices)
    dtype = resolve_dtype(setup.dtype, setup.checkpoint_dtype, device)
    if device == "cpu":
        os.nice(NICE)
    else:
        devices.use(device)
        progress(devices.choose_precision(dtype, tf32=setup.tf32))
        if (slow := devices.slow_dtype(dtype)) is not None:
            warn(slow)
        if setup.world > 1 and (little := devices.little_shared_memory()) is not None:
            warn(little)
        devices.choose_flash_attention(setup.flash_attention, device)
    if setup.world > 1:
        progress("joining the group")
        # A FileStore on the inherited memfd: torch's TCPStore would let any local user join, and a file could leak.
        dist.init_process_group(
            dist.get_default_backend_for_device(torch.device(device)),  # gloo; nccl, which is RCCL on ROCm
            store=dist.FileStore(f"/proc/self/fd/{store_fd}", setup.world),  # type: ignore[attr-defined]
            rank=setup.rank,
            world_size=setup.world,
            device_id=None if device == "cpu" else torch.device(device),  # connect now, not in the first forward
        )
    progress("loading weights")
    encoder = load_encoder(
        setup.path,
        device=device,
        dtype=dtype,
        rank=setup.rank,
        world=setup.world,
        facts=setup.facts,
    )
    if device != "cpu":
        ctypes.CDLL(None).malloc_trim(0)  # of the weights' way to the device: what was freed is kept otherwise
    if setup.world == 1:
        at_once = min(setup.threads, ON_A_CPU) if device == "cpu" else ON_A_GPU
        small = SMALL_BATCH if device == "cpu" and at_once > 1 else None
        computing = at_once if device == "cpu" else 1  # `Lane` computes one batch after another
        encoder.info = msgspec.structs.replace(encoder.info, at_once=at_once, computing=computing, batch_cost=small)
    store = TensorStore(arena_fd, setup.arena_bytes)
    if device != "cpu":
        progress("pinning the arena")
        try:
            store.pin()
        except RuntimeError as error:
            warn(f"the arena is not pinned, so that copies wait for the device: {first_line(error)}")
    return Worker(encoder, store, setup.rank)


def _forward_and_post(worker: Worker, command: m.Forward, channel: Channel) -> None:
    channel.post(m.encode(worker.forward(command)))


@contextlib.contextmanager
def _side_by_side(info: m.EncoderInfo, cores: int) -> Iterator[SideBySide | None]:
    if info.at_once == 1:
        yield None
        return
    threads = SideBySide(info.at_once, cores)
    try:
        yield threads
    finally:
        threads.close()


@contextlib.contextmanager
def _joined_group() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _attempt(rank: int, seq: int, action: Callable[[], None]) -> m.Done:
    try:
        action()
    except (ValueError, OSError, RuntimeError) as error:
        return m.Done(rank, seq, error=first_line(error))
    return m.Done(rank, seq)


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def main(argument: bytes, fds: Sequence[int]) -> int:
    """Load, say so, and execute commands."""
    setup = msgspec.msgpack.decode(argument, type=m.RankSetup)
    arena_fd, store_fd = fds
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel = Channel(context, setup.socket)
    try:
        with _joined_group(), contextlib.ExitStack() as freed:
            worker = load(
                setup,
                arena_fd,
                store_fd,
                lambda step: channel.send(m.encode(m.Progress(setup.rank, step))),
                lambda message: channel.send(m.encode(m.Warned(setup.rank, message))),
            )
            freed.callback(worker.close)
            info = worker.info
            gc.freeze()  # what is loaded stays: a collection that walks through it would idle the device
            channel.send(m.encode(m.Ready(setup.rank, info)))
            with _side_by_side(info, setup.threads) as threads:
                profiler = Profiler(info.device)
                serve(channel, worker, profiler, setup.rank, threads)
                profiler.close()
    except StartupError as error:
        channel.send(m.encode(m.Failed(setup.rank, str(error))))
        return 3
    except Exception as error:
        channel.send(m.encode(m.Failed(setup.rank, _one_line(error))))
        raise
    finally:
        channel.close()
        context.term()
    return 0
