"""Every error a client can cause or meet, each with its HTTP status and its code, in one place.

The message is for the caller: what was wrong, what was expected. It never holds a path or an internal address.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

MAX_MESSAGE = 1000  # characters: a message may quote what the caller sent


class EncodeError(Exception):
    """Base of what a request can end in. `status` is the HTTP status, `code` the word in the answer's `code` field.

    `bound`: which of the server's bounds refused, see `telemetry.metrics.REFUSING`; None where none did.
    """

    status = 500
    code = "internal"

    def __init__(self, message: str, *, headers: Mapping[str, str] | None = None, bound: str | None = None) -> None:
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + " …"
        super().__init__(message)
        self.message, self.bound = message, bound
        self.headers = dict(headers or {})

    def about_item(self, index: int) -> EncodeError:
        """The same error, its message naming the item of `mm_items` it is about (counted from 0)."""
        return type(self)(f"mm_items[{index}]: {self.message}", headers=self.headers, bound=self.bound)


class NoRoute(EncodeError):
    """No such path (404), or not with this method (405)."""

    def __init__(self, message: str, status: int, headers: Mapping[str, str] | None) -> None:
        super().__init__(message, headers=headers)
        self.status, self.code = status, HTTPStatus(status).name.lower()


class BadRequest(EncodeError):
    """The request is malformed: a missing field, a wrong type, an unknown modality."""

    status, code = 400, "bad_request"


class BadMedia(EncodeError):
    """The media cannot be fetched, decoded or preprocessed."""

    status, code = 400, "bad_media"


class Unauthorized(EncodeError):
    """No API key, or a wrong one."""

    status, code = 401, "unauthorized"


class Forbidden(EncodeError):
    """A source or destination that this server's options do not allow."""

    status, code = 403, "forbidden"


class UnknownModel(EncodeError):
    """A model of another name than this server's."""

    status, code = 404, "unknown_model"


class TooSlow(EncodeError):
    """The body arrives more slowly than the least rate."""

    status, code = 408, "too_slow"


class Duplicate(EncodeError):
    """The same part of the same request is in progress, or the uuid names other media in the store."""

    status, code = 409, "duplicate"


class TooLarge(EncodeError):
    """Body, media, pixels, frames or seconds above a limit."""

    status, code = 413, "too_large"


class UnsupportedModality(EncodeError):
    """The model has no encoder for this modality."""

    status, code = 415, "unsupported_modality"


class TooBusy(EncodeError):
    """Admission is full; the header `Retry-After` says when to come again (seconds)."""

    status, code = 429, "too_busy"


class EncodeFailed(EncodeError):
    """The forward pass itself failed for this input."""

    status, code = 500, "encode_failed"


class DeliveryFailed(EncodeError):
    """The destination refused the embedding or vanished while it was sent."""

    status, code = 502, "delivery_failed"


class NotReady(EncodeError):
    """The ranks are loading, restarting or gone."""

    status, code = 503, "not_ready"


class DeadlineExceeded(EncodeError):
    """The request's time was up before its embedding was delivered."""

    status, code = 504, "deadline_exceeded"


class StoreFull(EncodeError):
    """The embedding store's disk, or its limit of bytes, has no room for the embedding."""

    status, code = 507, "store_full"


def by_code(code: str, message: str) -> EncodeError:
    """The error whose code this is, for errors that cross from one process to another."""
    known = {kind.code: kind for kind in EncodeError.__subclasses__() if kind is not NoRoute}
    return known.get(code, EncodeError)(message)


class StartupError(Exception):
    """The server cannot start as asked. The message is one line for the operator; the process exits non-zero."""


def first_of(error: BaseException) -> BaseException:
    """The first error of an exception group, however deep the group is; any other error itself."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for a message or a log line of one line; its type's name if it has none."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__
