"""The answer to a request that outlasts the time a server takes to end."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from encode_server.wire.answers import ErrorAnswer


class Ending:
    """An ASGI middleware. uvicorn cancels what is in progress when its time to end is over, and would answer 500, with
    a traceback in the log, as if that were a fault of the application's."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = False

        async def send_noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():
                raise  # the application's own: nobody but uvicorn cancels the task of a request
            if begun:
                return  # uvicorn closes the connection of an answer that has no end
            answer = ErrorAnswer(code="not_ready", message="the server is stopping, and the request took too long")
            body = msgspec.json.encode(answer)
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": body})
