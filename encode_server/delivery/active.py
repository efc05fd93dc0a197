"""Which parts are being encoded for a destination: a part delivered twice fails its user's request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from encode_server.errors import Duplicate


class ActiveParts:
    """The (req_id, part_idx) in progress, and the destination host of each."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, int], tuple[str, asyncio.Event]] = {}

    @contextlib.contextmanager
    def hold(self, req_id: str, part_idx: int, host: str) -> Iterator[None]:
        """Be the only request that works on this part. Raises Duplicate."""
        key = (req_id, part_idx)
        if key in self._parts:
            raise Duplicate(f"part {part_idx} of req_id {req_id!r} is already in progress")
        ended = asyncio.Event()
        self._parts[key] = (host, ended)
        try:
            yield
        finally:
            del self._parts[key]
            ended.set()

    async def others_ended(self, req_id: str, part_idx: int, host: str) -> None:
        """Return once the parts for `host` that are in progress now have ended, but for this one and for those that
        wait here as well."""
        key = (req_id, part_idx)
        entry = self._parts[key]
        entry[1].set()  # nobody waits for a part that only waits to fail
        others = [ended for other, (destination, ended) in self._parts.items() if destination == host and other != key]
        for ended in others:
            await ended.wait()
