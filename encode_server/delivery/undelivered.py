"""A bound on the memory of embeddings that are encoded and not yet taken by their destination."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from encode_server.errors import TooBusy
from encode_server.runtime.changes import Changes


class Undelivered:
    """Counts bytes and takes no more than `max_bytes`; a single embedding is always taken when there is no other."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._changes = Changes()
        self.bytes = 0

    @contextlib.asynccontextmanager
    async def hold(self, nbytes: int, *, patient: bool) -> AsyncIterator[None]:
        """Count an embedding while it waits for its destination. When too many bytes wait already, a patient caller
        waits until there is room; otherwise this raises TooBusy."""
        while self.bytes and self.bytes + nbytes > self.max_bytes:
            if not patient:
                raise TooBusy(
                    f"{self.bytes >> 20} MiB of embeddings wait for their destinations, the limit is "
                    f"{self.max_bytes >> 20} MiB",
                    headers={"Retry-After": "1"},
                    bound="undelivered",
                )
            await self._changes.wait()
        self.bytes += nbytes
        try:
            yield
        finally:
            self.bytes -= nbytes
            self._changes.announce()
