"""What can go wrong on the caller's side. Running out of time is Python's own `TimeoutError`."""

from __future__ import annotations


class ClientError(Exception):
    """Base of every error the client raises, time-outs apart."""


class EncodeServerError(ClientError):
    """The server answered with an error, or pushed one in place of a part.

    `status`: the HTTP status. `code`: the word for programs (`bad_media`, `too_busy`, …; `unknown` when the answer was
    not the server's own). `req_id`: the request, where the answer named it. `retry_after`: seconds, where given.
    """

    def __init__(
        self, status: int, code: str, message: str, *, req_id: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(f"{status} {code}: {message}")
        self.status = status
        self.code = code
        self.message = message
        self.req_id = req_id
        self.retry_after = retry_after


class ServerUnreachable(ClientError):
    """No connection, or one that broke before the answer was complete. Another encoder may do better.

    `connected`: whether there was a connection, so that the server may have begun the work.
    """

    def __init__(self, message: str, *, connected: bool = True) -> None:
        super().__init__(message)
        self.connected = connected


class ProtocolError(ClientError):
    """An answer or a set of parts that does not follow the protocol."""


class ReceiverClosed(ClientError):
    """The receiver was closed while somebody waited for an embedding."""
