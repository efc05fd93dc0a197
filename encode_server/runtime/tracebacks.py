"""What an exception that has been dealt with still holds."""

from __future__ import annotations

import traceback


def let_go(error: BaseException) -> None:
    """Drop the variables of every function that `error` and the errors behind it came through.

    An exception keeps its frames, and a frame often keeps the exception: such a cycle, with the request's media in it,
    stays until the next full garbage collection, which may be minutes away.
    """
    found: list[BaseException] = [error]
    seen: set[int] = set()
    while found:
        next_error = found.pop()
        if id(next_error) in seen:
            continue
        seen.add(id(next_error))
        traceback.clear_frames(next_error.__traceback__)
        next_error.__traceback__ = None
        found += [other for other in (next_error.__cause__, next_error.__context__) if other is not None]
        if isinstance(next_error, BaseExceptionGroup):
            found += next_error.exceptions
