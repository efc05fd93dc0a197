"""What the front and the forkserver say to each other, one message per packet, descriptors beside it."""

from __future__ import annotations

import msgspec

LARGEST = 128 << 10
"""Bytes of the largest packet."""


class Fork(msgspec.Struct, frozen=True, tag="fork"):
    """Front to forkserver: fork a child that calls `entry` (`module:function`) with `argument` and the descriptors that
    come with this packet. `name`: the process' name for `ps` and `top`, 15 characters at most."""

    number: int
    name: str
    entry: str
    argument: bytes


class Forked(msgspec.Struct, frozen=True, tag="forked"):
    """Forkserver to front: the child of `Fork` number `number`; its pidfd comes with this packet."""

    number: int
    pid: int


class Exited(msgspec.Struct, frozen=True, tag="exited"):
    """Forkserver to front: a child has ended. `code`: its exit status, or minus the number of the signal."""

    pid: int
    code: int


ForkEvent = Forked | Exited

encode = msgspec.msgpack.Encoder().encode
decode_fork = msgspec.msgpack.Decoder(Fork).decode
decode_event = msgspec.msgpack.Decoder(ForkEvent).decode
