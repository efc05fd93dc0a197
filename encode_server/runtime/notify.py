"""Tell systemd how far the server is, where systemd started it with `Type=notify` (sd_notify(3))."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(state: str) -> None:
    """Send a state, e.g. `READY=1`. Nothing happens where nobody listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.connect(address.replace("@", "\0", 1) if address[0] == "@" else address)
        out.send(state.encode())
