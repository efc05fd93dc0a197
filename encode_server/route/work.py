"""Work of the proxy for a request: several pieces of it concurrently, and large documents beside the loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import msgspec

from encode_server.client import Item, ItemInfo, Modality
from encode_server.client.media import Piece
from encode_server.route.chat import LIMITS
from encode_server.runtime.arriving import Raw
from encode_server.runtime.outline import Outline
from encode_server.runtime.pools import Pace, run_sized


@dataclass(frozen=True)
class Document:
    """A request's body that may be changed before it is sent on. `raw`: as it came."""

    raw: Raw
    found: Outline[Any]
    pool: Executor

    async def written(self, changes: Mapping[str, object], without: Collection[str] = ()) -> list[Piece]:
        """The body as it is now, as JSON in pieces, its long strings as they came. `changes`: fields that are others in
        this copy; `without`: fields that the copy lacks."""
        body = {name: value for name, value in self.found.body.items() if name not in without} | dict(changes)
        nbytes = min(len(self.raw), LIMITS.max_bytes)
        return self.found.restored(await run_sized(self.pool, Pace.JSON, nbytes, msgspec.json.encode, body))


async def concurrently(
    items: Mapping[Modality, list[Item]],
    encode: Callable[[list[Item], Modality], Awaitable[tuple[ItemInfo, ...]]],
) -> dict[Modality, tuple[ItemInfo, ...]]:
    """Have the items of each modality encoded; what is known of each, in their order. Raises the first failure."""

    async def one(some: list[Item], modality: Modality) -> tuple[ItemInfo, ...]:
        return await encode(some, modality)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = {modality: group.create_task(one(some, modality)) for modality, some in items.items()}
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return {modality: task.result() for modality, task in tasks.items()}
