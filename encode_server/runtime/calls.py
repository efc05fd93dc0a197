"""A function called once, in a child process of its own, for its result: see `Forkserver.call`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module

import msgspec

from encode_server.errors import StartupError


def answer(argument: bytes, fds: Sequence[int]) -> int:
    """Call the function that `argument` names, and write its result, or the message of its StartupError, to `fds[0]`.

    The function gets its argument as msgpack decodes it, whatever its annotation says.
    """
    name, payload = msgspec.msgpack.decode(argument, type=tuple[str, bytes])
    module, _, function = name.partition(":")
    try:
        value = getattr(import_module(module), function)(msgspec.msgpack.decode(payload))
        result = msgspec.msgpack.encode((True, value))
    except StartupError as error:
        result = msgspec.msgpack.encode((False, str(error)))
    view = memoryview(result)
    while view:
        view = view[os.write(fds[0], view) :]
    return 0
