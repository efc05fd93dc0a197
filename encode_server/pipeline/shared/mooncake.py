"""Mooncake Store: the memory of many hosts as one cache, by RDMA or TCP. Its master says where a value lies.

The store's calls have no time-out of their own. A look-up ends in time all the same, because nobody waits for the
thread any longer; the thread itself ends when the store's own limits do.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from encode_server.pipeline.shared.line import Refused, Unreachable, Value

log = logging.getLogger(__name__)

LOCAL_BYTES = 128 << 20  # through which values pass; larger ones cannot
NO_SPACE, EXISTS = -200, -705  # of the store's answers


@dataclass(frozen=True)
class MooncakeAddress:
    """`master`: host:port. `host`: this machine's address, as the others reach it. `segment_bytes`: memory of this
    process that the store may use for anybody's values."""

    master: str
    host: str
    segment_bytes: int
    protocol: str
    device: str


def parse_mooncake(url: str, host: str | None, protocol: str, device: str) -> MooncakeAddress:
    """`mooncake://master:port[/MiB]`, the MiB that this process lends to the store. Raises ValueError."""
    parts = urlsplit(url)
    lent = parts.path.strip("/")
    try:
        port = parts.port
    except ValueError:
        port = None
    if not parts.hostname or port is None or (lent and not (lent.isascii() and lent.isdigit() and len(lent) < 8)):
        raise ValueError("expected mooncake://master:port[/MiB lent to the store]")
    if host is None:
        raise ValueError("mooncake:// needs --mooncake-host, this host's address")
    return MooncakeAddress(f"{parts.hostname}:{port}", host, int(lent or 0) << 20, protocol, device)


class MooncakeStore:
    """One client of the store, which all lines share. Raises ImportError without the package."""

    def __init__(self, address: MooncakeAddress) -> None:
        if address.protocol == "tcp":
            os.environ.setdefault("MC_FORCE_TCP", "1")
        from mooncake.store import MooncakeDistributedStore

        self._make = MooncakeDistributedStore
        self._address = address
        self._client: Any = None
        self._lock = threading.Lock()

    def line(self) -> MooncakeLine:
        """See `Store`."""
        return MooncakeLine(self)

    def client(self) -> Any:
        """The client, set up when it is first used. Raises Unreachable."""
        with self._lock:
            if self._client is None:
                address, made = self._address, self._make()
                answer = made.setup(
                    address.host,
                    "P2PHANDSHAKE",
                    address.segment_bytes,
                    LOCAL_BYTES,
                    address.protocol,
                    address.device,
                    address.master,
                )
                if answer != 0:
                    raise Unreachable(f"Mooncake's store cannot be set up ({answer})")
                self._client = made
            return self._client


class MooncakeLine:
    """See `Line`."""

    def __init__(self, store: MooncakeStore) -> None:
        self._store = store

    def fetch(self, keys: Sequence[str], limit: int, deadline: float) -> Iterator[memoryview | None]:
        """See `Line`."""
        for value in self._store.client().get_batch(list(keys)):
            yield memoryview(value) if value else None

    def store(self, entries: Sequence[tuple[str, Value]], deadline: float) -> Iterator[Refused | None]:
        """See `Line`. A value stays until the store needs its room: there is no age."""
        client = self._store.client()
        for key, value in entries:
            answer = client.put_parts(key, *value)
            yield None if answer in (0, EXISTS) else Refused(f"Mooncake's store: {answer}", full=answer == NO_SPACE)

    def close(self) -> None:
        """See `Line`. The client stays: its memory may hold what others look up."""
