"""A rank without torch: it says that it is ready, answers pings, and never ends a forward. On any device but a CPU it
says how much of the device's memory is used."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import zmq

from encode_server.runtime.channel import Channel
from encode_server.wire import ranks as m
from tests.engine.group_standin import INFO

MEMORY = m.DeviceMemory(used=30, reserved=20, peak=10, total=80)


def main(argument: bytes, fds: Sequence[int]) -> int:
    """As `encode_server.engine.rank.main`."""
    setup = msgspec.msgpack.decode(argument, type=m.RankSetup)
    channel = Channel(zmq.Context(), setup.socket)
    channel.send(m.encode(m.Ready(setup.rank, INFO)))
    while True:
        match m.decode_command(channel.receive()[0]):
            case m.Ping(seq):
                memory = None if setup.device == "cpu" else MEMORY
                channel.send(m.encode(m.Done(setup.rank, seq, memory=memory)))
            case m.Shutdown():
                return 0
