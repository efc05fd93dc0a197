"""A bound on the memory of embeddings that are encoded and not yet taken by their destination."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from encode_server.errors import TooBusy, TooLarge
from encode_server.runtime.changes import Changes


class Undelivered:
    """Counts bytes and takes no more than `max_bytes`, of one client no more than `share` (above 0, up to 1) of them,
    but for a single embedding. The share holds for a client that is alone, too: what that client takes slowly would
    keep out whoever comes next.
    """

    def __init__(self, max_bytes: int, share: float) -> None:
        self.max_bytes, self._share = max_bytes, share
        self._changes = Changes()
        self._clients: Counter[str] = Counter()
        self.bytes = 0

    @contextlib.asynccontextmanager
    async def hold(self, nbytes: int, client: str, *, patient: bool) -> AsyncIterator[None]:
        """Count an embedding while it waits for its destination. When too many bytes wait already, a patient caller
        waits until there is room; otherwise this raises TooBusy. Raises TooLarge for what could never be held."""
        if nbytes > self.max_bytes:
            raise TooLarge(
                f"the embedding takes {-(-nbytes >> 20)} MiB on its way, at most {self.max_bytes >> 20} MiB are "
                "delivered: send the items in several requests"
            )
        while (refusal := self._refusal(nbytes, client)) is not None:
            if not patient:
                reason, bound = refusal
                raise TooBusy(reason, headers={"Retry-After": "1"}, bound=bound)
            await self._changes.wait()
        self._count(client, nbytes)
        try:
            yield
        finally:
            self._count(client, -nbytes)
            self._changes.announce()

    def _refusal(self, nbytes: int, client: str) -> tuple[str, str] | None:
        """Why there is no room, and which bound says so."""
        held, most, mine = self.bytes, self.max_bytes, self._clients[client]
        if held + nbytes > most:
            reason = f"{held >> 20} MiB of embeddings wait for their destinations, the limit is {most >> 20} MiB"
            return reason, "undelivered"
        if mine and mine + nbytes > most * self._share:
            reason = f"{mine >> 20} MiB of this client's embeddings wait for their destinations, its full share"
            return reason, "client_share"
        return None

    def _count(self, client: str, nbytes: int) -> None:
        self.bytes += nbytes
        self._clients[client] += nbytes
        if not self._clients[client]:
            del self._clients[client]
