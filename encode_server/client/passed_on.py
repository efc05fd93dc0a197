"""What a program that calls encoders on behalf of its own callers adds to those calls: headers such as the trace, and
somebody who watches each call.

Both travel with asyncio's context, so that functions in between need not know of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Self

_NOTHING: Mapping[str, str] = {}


class Call:
    """A request to another server, from its first byte to the last of the answer, as its watcher sees the request;
    a context manager, which ends the call. This class watches nothing. `headers`: go along with the request."""

    headers: Mapping[str, str] = _NOTHING

    def answered(self, status: int) -> None:
        """The answer has begun, with this HTTP status."""

    def end(self, error: BaseException | None = None) -> None:
        """The request has ended; `error`: why no whole answer came. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(exc)


Watcher = Callable[[str, str], Call]

_UNWATCHED = Call()
_passed_on: ContextVar[Mapping[str, str]] = ContextVar("passed_on", default=_NOTHING)
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def pass_on(headers: Mapping[str, str], watcher: Watcher | None = None) -> None:
    """From here on, in this task and those it starts, requests to encoders carry these headers too. `watcher`: given
    method and URL of each request as the request begins."""
    _passed_on.set(headers)
    _watcher.set(watcher)


def passed_on() -> Mapping[str, str]:
    """What `pass_on` was given last, nothing outside."""
    return _passed_on.get()


def begin_call(method: str, url: str) -> Call:
    """A request that begins now, to be ended by whoever makes the request."""
    watcher = _watcher.get()
    return _UNWATCHED if watcher is None else watcher(method, url)
