"""Which parts are being encoded for a destination: a part delivered twice fails its user's request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from encode_server.errors import Duplicate


class ActiveParts:
    """The (req_id, part_idx) in work."""

    def __init__(self) -> None:
        self._parts: set[tuple[str, int]] = set()

    @contextlib.contextmanager
    def hold(self, req_id: str, part_idx: int) -> Iterator[None]:
        """Be the only one that works on this part. Raises Duplicate."""
        key = (req_id, part_idx)
        if key in self._parts:
            raise Duplicate(f"part {part_idx} of req_id {req_id!r} is already being worked on")
        self._parts.add(key)
        try:
            yield
        finally:
            self._parts.discard(key)
