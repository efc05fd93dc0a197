"""How large a part's embedding will be: told to those who have to make room for it, before it exists (Mooncake)."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

from encode_server.errors import DeadlineExceeded, EncodeError, TooBusy

MAX_WAITING = 16384  # who waits for a size
MAX_FAILED = 1024  # parts that came to nothing, whose reason is still told


@dataclass(frozen=True)
class Size:
    """[rows, dim] values of `nbytes` bytes together."""

    rows: int
    dim: int
    nbytes: int


class Sizes:
    """The sizes of parts in progress, by req_id. A size may be asked for before its part has arrived."""

    def __init__(self) -> None:
        self._known: dict[str, Size] = {}
        self._asked: dict[str, asyncio.Future[Size]] = {}
        self._askers: dict[str, int] = {}
        self._failed: OrderedDict[str, EncodeError] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known) + sum(self._askers.values())

    def tell(self, req_id: str, size: Size) -> None:
        """The size is known."""
        self._known[req_id] = size
        if (asked := self._asked.get(req_id)) is not None and not asked.done():
            asked.set_result(size)

    def fail(self, req_id: str, error: EncodeError) -> None:
        """There will be no embedding. Who asks a little later is told the reason, too."""
        self._known.pop(req_id, None)
        self._failed[req_id] = error
        if len(self._failed) > MAX_FAILED:
            self._failed.popitem(last=False)
        if (asked := self._asked.get(req_id)) is not None and not asked.done():
            asked.set_exception(error)
            asked.exception()

    @contextlib.contextmanager
    def part(self, req_id: str) -> Iterator[None]:
        """While the part is in progress."""
        self._failed.pop(req_id, None)
        try:
            yield
        finally:
            self._known.pop(req_id, None)

    async def ask(self, req_id: str, wait_s: float) -> Size:
        """The size, once it is known. Raises DeadlineExceeded, TooBusy, and what the part ended in."""
        if (known := self._known.get(req_id)) is not None:
            return known
        if (failed := self._failed.get(req_id)) is not None:
            raise type(failed)(failed.message)
        if sum(self._askers.values()) >= MAX_WAITING:
            raise TooBusy(f"{MAX_WAITING} callers wait for the size of an embedding")
        if (asked := self._asked.get(req_id)) is None or asked.done():
            asked = self._asked[req_id] = asyncio.get_running_loop().create_future()
        self._askers[req_id] = self._askers.get(req_id, 0) + 1
        try:
            await asyncio.wait((asked,), timeout=wait_s)
        finally:
            self._askers[req_id] -= 1
            if not self._askers[req_id]:
                del self._askers[req_id]
                if self._asked.get(req_id) is asked:
                    del self._asked[req_id]
        if not asked.done():
            raise DeadlineExceeded(f"the size of the embedding was not known within {wait_s:g} s")
        if (error := asked.exception()) is not None:
            assert isinstance(error, EncodeError)
            raise type(error)(error.message)
        return asked.result()
