"""Work of the proxy beside the loop, or several pieces of it concurrently."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import ParamSpec, TypeVar

from encode_server.client import Item, ItemInfo, Modality

P = ParamSpec("P")
T = TypeVar("T")

SMALL_BODY = 64 << 10  # decoded on the loop: less work than a change of threads


async def maybe_threaded(size: int, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result; in a thread where it works on so many bytes that the loop would wait."""
    if size >= SMALL_BODY:
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)


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
