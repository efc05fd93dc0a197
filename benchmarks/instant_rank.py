"""A rank that answers immediately, or after a given time for each item, as a device would that takes no core: it takes
the place of an encoder, so that all else can be measured without one.

The embeddings are zeros of the width and dtype that a real encoder would have. The forkserver runs `main` in a child.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import zmq

from encode_server.runtime.channel import Channel
from encode_server.wire import ranks as m
from encode_server.wire.embedding import embedding_bytes
from encode_server.wire.modality import Modality

WIDTH_VARIABLE = "BENCHMARK_RANK_WIDTH"
DTYPE_VARIABLE = "BENCHMARK_RANK_DTYPE"
ITEM_VARIABLE = "BENCHMARK_RANK_ITEM_S"  # seconds that an item takes, one item after another
LOAD_VARIABLE = "BENCHMARK_RANK_LOAD_S"  # seconds from the start of a rank until it is ready
BROKEN_VARIABLE = "BENCHMARK_RANK_BROKEN"  # a file that names the device on which no rank can start
SIDE_BY_SIDE = 2  # forwards, as on a GPU


def main(argument: bytes, fds: Sequence[int]) -> int:
    """Say that an encoder is loaded, and acknowledge every command."""
    setup = msgspec.msgpack.decode(argument, type=m.RankSetup)
    if _broken() == str(setup.device_index):
        return 1
    item_s = float(os.environ.get(ITEM_VARIABLE, "0"))
    time.sleep(float(os.environ.get(LOAD_VARIABLE, "0")))
    arena_fd, store_fd = fds
    os.close(store_fd)
    width, dtype = int(os.environ[WIDTH_VARIABLE]), os.environ[DTYPE_VARIABLE]
    arena = np.frombuffer(mmap.mmap(arena_fd, setup.arena_bytes), np.uint8)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    channel = Channel(context, setup.socket)
    info = m.EncoderInfo("instant", dict.fromkeys(Modality, width), dtype, "cpu", 0, 1 if item_s else SIDE_BY_SIDE)
    channel.send(m.encode(m.Ready(setup.rank, info)))
    while True:
        match m.decode_command(channel.receive()[0]):
            case m.Forward(seq, _, items):
                time.sleep(item_s * len(items))
                for item in items:
                    _write_zeros(arena, item.output)
                channel.send(m.encode(m.Done(setup.rank, seq, forward_s=item_s * len(items))))
            case m.Ping(seq) | m.StartProfile(seq) | m.StopProfile(seq):
                channel.send(m.encode(m.Done(setup.rank, seq)))
            case m.Shutdown():
                channel.close()
                context.term()
                return 0


def _broken() -> str:
    try:
        return Path(os.environ[BROKEN_VARIABLE]).read_text().strip()
    except (KeyError, OSError):
        return ""


def _write_zeros(arena: np.ndarray[tuple[int], np.dtype[np.uint8]], output: m.TensorRef) -> None:
    """Overwrite what lay there before, which may be no number: a health probe would notice."""
    rows, width = output.shape
    arena[output.offset : output.offset + embedding_bytes(rows, width, output.dtype)] = 0
