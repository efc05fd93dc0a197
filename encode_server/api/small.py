"""Small JSON bodies: those of control requests, which hold no media."""

from __future__ import annotations

from typing import TypeVar

import msgspec
from starlette.requests import Request

from encode_server.errors import BadRequest, TooLarge

MAX_BYTES = 64 << 10

T = TypeVar("T")


async def read_small(request: Request, kind: type[T]) -> T:
    """The body as `kind`; an empty one counts as `{}`. Raises BadRequest, TooLarge."""
    raw = bytearray()
    async for chunk in request.stream():
        raw += chunk
        if len(raw) > MAX_BYTES:
            raise TooLarge(f"the body has more than {MAX_BYTES} bytes")
    try:
        return msgspec.json.decode(raw.strip() or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRequest(f"the body is not the JSON expected: {error}") from None
