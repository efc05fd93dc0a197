"""A request's body: its bytes within a limit, and what they say as JSON."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from encode_server.errors import BadRequest, TooLarge, TooSlow
from encode_server.runtime.arriving import BODY_BYTES, Arriving, Raw
from encode_server.runtime.caller import CallerGone
from encode_server.runtime.charge import Charge, free

SMALL = 64 << 10  # of requests that hold no media
LARGE = 1 << 20  # memory that is given back in a thread

GRACE_S = 5.0  # a client may send or take nothing for so long before its rate counts

T = TypeVar("T")


@dataclass
class LeastRate:
    """How slowly bytes may come or go: `bytes_per_s` on average, after `GRACE_S`. Only the time in which the client is
    waited for counts. 0: any rate."""

    bytes_per_s: int
    _bytes: int = 0
    _waited_s: float = 0.0

    @property
    def left_s(self) -> float | None:
        """For how many seconds the client may be waited for now."""
        if not self.bytes_per_s:
            return None
        return max(0.0, GRACE_S + self._bytes / self.bytes_per_s - self._waited_s)

    async def wait(self, client: Awaitable[T]) -> T:
        """What the client is waited for. Raises TimeoutError when it is too slow."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.left_s):
                return await client
        finally:
            self._waited_s += time.monotonic() - began

    def count(self, nbytes: int) -> None:
        """So many bytes came, or went."""
        self._bytes += nbytes


def declared_length(request: Request) -> int:
    """The body's bytes as its header has it; 0 when it does not say."""
    declared = request.headers.get("content-length", "")
    return int(declared) if declared.isascii() and declared.isdigit() else 0


async def chunks(
    request: Request, max_bytes: int, least_rate: int = 0, charge: Charge = free
) -> AsyncGenerator[bytes, None]:
    """The body as it arrives, each piece charged before it is given.

    Raises TooLarge above `max_bytes`, before reading on, TooSlow below `least_rate` bytes a second, CallerGone, and
    whatever `charge` raises.
    """
    received, rate, stream = 0, LeastRate(least_rate), request.stream()
    while True:
        try:
            chunk = await rate.wait(anext(stream, None))
        except ClientDisconnect:
            raise CallerGone from None
        except TimeoutError:
            raise TooSlow(
                f"{received} bytes of the body have arrived, expected {least_rate} a second after {GRACE_S:g} s",
                headers={"Connection": "close"},
            ) from None
        if chunk is None:
            return
        received += len(chunk)
        rate.count(len(chunk))
        if received > max_bytes:
            raise TooLarge(f"the body has more than {max_bytes} bytes")
        await charge(len(chunk))
        yield chunk


async def read_all(
    request: Request, max_bytes: int, least_rate: int = 0, charge: Charge = free, pool: Executor | None = None
) -> Arriving:
    """The whole body. `pool`: gives the memory back of a large one that does not come to its end. Raises as `chunks`
    does."""
    body = Arriving(BODY_BYTES)
    try:
        async for chunk in chunks(request, max_bytes, least_rate, charge):
            body.append(chunk)
    except BaseException:
        if pool is not None and len(body) > LARGE:
            pool.submit(body.close)
        else:
            body.close()
        raise
    return body


def from_json(raw: Raw, kind: type[T]) -> T:
    """The JSON in `raw` as `kind`. Raises BadRequest."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not the JSON expected: {error}") from None
    except RecursionError:
        raise BadRequest("the body is not the JSON expected: it is nested too deeply") from None


async def read_small(request: Request, kind: type[T]) -> T:
    """A body without media as `kind`; an empty one counts as `{}`. Raises BadRequest, TooLarge, CallerGone."""
    return from_json((await read_all(request, SMALL, SMALL)).take().strip() or b"{}", kind)
