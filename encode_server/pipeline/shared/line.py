"""What the shared cache is kept in, as this server sees it: values by key, over lines that one thread uses each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

Value = Sequence[bytes | memoryview]
"""A value's bytes, in pieces that follow one another."""


class Unreachable(Exception):
    """No connection, or one that broke."""


class Refused(Exception):
    """The cache answered with an error. `full`: it has no room."""

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class Line(Protocol):
    """One connection, made when it is first used. Its methods block until `deadline`, of `time.monotonic()`, and raise
    TimeoutError then; they also raise Unreachable and Refused. After an error, the line connects anew."""

    def fetch(self, keys: Sequence[str], limit: int, deadline: float) -> Iterator[memoryview | None]:
        """The values of `keys` in their order, each as soon as it is there; None where there is none. All are asked for
        in one round trip. Of a value of more than `limit` bytes the rest may be missing."""

    def store(self, entries: Sequence[tuple[str, Value]], deadline: float) -> Iterator[Refused | None]:
        """Keep values by their keys; for each None, or why it is not kept."""

    def close(self) -> None:
        """Disconnect. Called from another thread, it ends what the line is doing."""


class Store(Protocol):
    """Makes lines."""

    def line(self) -> Line:
        """A line, not connected yet."""
