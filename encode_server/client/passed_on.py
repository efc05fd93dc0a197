"""Headers that a program which calls encoders on behalf of its own callers adds to those calls, such as the trace.

The headers travel with asyncio's context, so that functions in between need not know of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar

_NOTHING: Mapping[str, str] = {}
_passed_on: ContextVar[Mapping[str, str]] = ContextVar("passed_on", default=_NOTHING)


def pass_on(headers: Mapping[str, str]) -> None:
    """From here on, in this task and those it starts, requests to encoders carry these headers too."""
    _passed_on.set(headers)


def passed_on() -> Mapping[str, str]:
    """What `pass_on` was given last, nothing outside."""
    return _passed_on.get()
