"""By which names a request is known while it is served: in log lines, in its answer, in traces.

The ids travel with asyncio's context, so that whatever is logged on the request's way carries them.
"""

from __future__ import annotations

import re
import uuid
from contextvars import ContextVar
from dataclasses import dataclass

MAX_LENGTH = 128  # characters kept of a caller's id
_UNUSUAL = re.compile(r"[^A-Za-z0-9._:/+=@~-]")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True)
class RequestIds:
    """`request_id`: the caller's `X-Request-ID`, or made here. `given`: it is the caller's. `trace_id`: 32 hexadecimal
    digits, None outside a trace. `sampled`: somebody records the trace."""

    request_id: str
    given: bool = False
    trace_id: str | None = None
    sampled: bool = False


_current: ContextVar[RequestIds | None] = ContextVar("request_ids", default=None)


def current_ids() -> RequestIds | None:
    """The ids of the request that is being served; None outside."""
    return _current.get()


def enter_request(ids: RequestIds) -> None:
    """From here on, in this task and those it starts, `current_ids` are these."""
    _current.set(ids)


def ids_from_headers(request_id: str | None, traceparent: str | None) -> RequestIds:
    """The ids that a caller's headers ask for. An id is cut to `MAX_LENGTH` characters, and `_` takes the place of what
    a log or a header would have to escape; a `traceparent` that is none counts as absent (W3C Trace Context)."""
    trace = _TRACEPARENT.fullmatch(traceparent.strip()) if traceparent else None
    trace_id, flags = (trace[1], int(trace[2], 16)) if trace else (None, 0)
    name = _UNUSUAL.sub("_", request_id.strip()[:MAX_LENGTH]) if request_id else ""
    return RequestIds(name or uuid.uuid4().hex, bool(name), trace_id, bool(flags & 1))
