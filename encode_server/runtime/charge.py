"""Who pays for bytes that arrive."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

Charge = Callable[[int], Awaitable[None]]
"""Counts so many bytes more, before they are kept. Raises TooLarge or TooBusy where there is no room for them."""


async def free(nbytes: int) -> None:
    """Counts nothing: for bytes that nobody pays for, as those of a probe."""
