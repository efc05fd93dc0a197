"""Parts that came before anybody asked for them, bounded in bytes and age."""

from __future__ import annotations

import asyncio

from encode_server.client.assembly import Assembly, Part


class EarlyParts:
    """Keeps the parts of requests nobody waits for yet, at most `max_bytes` in all and `max_age` seconds each.

    The age counts from a request's first part. Beyond the bytes, the request that came first goes first. Used on the
    loop only.
    """

    def __init__(self, max_bytes: int, max_age: float) -> None:
        self.max_bytes = max_bytes
        self.max_age = max_age
        self.held_bytes = 0
        self._assemblies: dict[str, tuple[Assembly, asyncio.TimerHandle]] = {}
        self._refused: set[str] = set()

    def __len__(self) -> int:
        return len(self._assemblies)

    def add(self, part: Part) -> bool:
        """Takes a part in; False for one that is here already. Raises `ProtocolError` if it contradicts the others."""
        req_id = part.header.req_id
        if req_id in self._refused:
            return False
        if req_id in self._assemblies:
            assembly = self._assemblies[req_id][0]
        else:
            assembly = Assembly(req_id)
            expiry = asyncio.get_running_loop().call_later(self.max_age, self.take, req_id)
            self._assemblies[req_id] = assembly, expiry
        added = assembly.add(part)
        if added:
            self.held_bytes += part.cost
        while self.held_bytes > self.max_bytes:
            self.take(next(iter(self._assemblies)))
        return added

    def take(self, req_id: str) -> Assembly | None:
        """Hands over what is kept for a request and forgets it."""
        entry = self._assemblies.pop(req_id, None)
        if entry is None:
            return None
        assembly, expiry = entry
        expiry.cancel()
        self.held_bytes -= assembly.cost
        return assembly

    def refuse(self, req_id: str) -> None:
        """Forgets a request, and takes nothing in for it for the next `max_age` seconds."""
        self.take(req_id)
        if req_id not in self._refused:
            self._refused.add(req_id)
            asyncio.get_running_loop().call_later(self.max_age, self._refused.discard, req_id)

    def clear(self) -> None:
        """Forgets everything."""
        for req_id in list(self._assemblies):
            self.take(req_id)
