"""A request's body: its bytes within a limit, and what they say as JSON."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from encode_server.errors import BadRequest, TooLarge
from encode_server.runtime.caller import CallerGone

SMALL = 64 << 10  # of requests that hold no media

T = TypeVar("T")


async def chunks(request: Request, max_bytes: int) -> AsyncGenerator[bytes, None]:
    """The body as it arrives. Raises TooLarge above `max_bytes`, before reading on, and CallerGone."""
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > max_bytes:
                raise TooLarge(f"the body has more than {max_bytes} bytes")
            yield chunk
    except ClientDisconnect:
        raise CallerGone from None


async def read_all(request: Request, max_bytes: int) -> bytearray:
    """The whole body. Raises as `chunks` does."""
    raw = bytearray()
    async for chunk in chunks(request, max_bytes):
        raw += chunk
    return raw


def from_json(raw: bytes | bytearray, kind: type[T]) -> T:
    """The JSON in `raw` as `kind`. Raises BadRequest."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not the JSON expected: {error}") from None
    except RecursionError:
        raise BadRequest("the body is not the JSON expected: it is nested too deeply") from None


async def read_small(request: Request, kind: type[T]) -> T:
    """A body without media as `kind`; an empty one counts as `{}`. Raises BadRequest, TooLarge, CallerGone."""
    return from_json((await read_all(request, SMALL)).strip() or b"{}", kind)
