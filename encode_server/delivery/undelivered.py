"""A bound on the memory of embeddings that are encoded and not yet taken by their destination."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from encode_server.errors import TooBusy


class Undelivered:
    """Counts bytes and refuses more than `max_bytes`; a single embedding is always taken when there is no other."""

    def __init__(self, max_bytes: int) -> None:
        self._max = max_bytes
        self.bytes = 0

    @contextlib.contextmanager
    def hold(self, nbytes: int) -> Iterator[None]:
        """Count an embedding while it waits. Raises TooBusy when too much waits already."""
        if self.bytes and self.bytes + nbytes > self._max:
            raise TooBusy(
                f"{self.bytes >> 20} MiB of embeddings wait for their destinations, at most {self._max >> 20} MiB may",
                headers={"Retry-After": "1"},
            )
        self.bytes += nbytes
        try:
            yield
        finally:
            self.bytes -= nbytes
