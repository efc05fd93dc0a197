"""One replica: one server with its preparers and ranks, in a process that Ray Serve starts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.types import Message, Scope

from encode_server.app import create_app
from encode_server.errors import StartupError
from encode_server.settings import load_settings
from encode_server.telemetry import logs

LOOK_S = 0.1


class EncoderReplica:
    """The deployment's class. A request is an ASGI scope and a body; the answer, ASGI messages: what a web server
    would give to the application, and take from it."""

    async def __init__(self, options: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits it
        """Start the server and wait until it takes requests. `options`: by field name, see `Settings`.

        Raises StartupError when it cannot start as asked.
        """
        self._fatal: str | None = None
        self._stack = contextlib.AsyncExitStack()
        settings = load_settings(options)
        logs.configure(settings.log_level, settings.log_format)
        self._app = create_app(settings, self._on_fatal)
        self._server = self._app.state.server
        await self._stack.enter_async_context(self._app.router.lifespan_context(self._app))
        while self._server.not_ready() is not None:
            if self._fatal is not None:
                await self._stack.aclose()
                raise StartupError(self._fatal)
            await asyncio.sleep(LOOK_S)

    async def handle(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """Answer a request: its `http.response.start`, then its bodies."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue(4)
        unread = True

        async def receive() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # who goes away cancels the whole call
            raise AssertionError("unreachable")

        async def answer() -> None:
            try:
                await self._app(scope, receive, messages.put)
            except asyncio.CancelledError:
                raise  # nobody takes messages any more
            except BaseException:
                await messages.put(None)
                raise
            await messages.put(None)

        answering = asyncio.create_task(answer())
        try:
            while (message := await messages.get()) is not None:
                yield {key: bytes(value) if key == "body" else value for key, value in message.items()}
            await answering
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)

    async def metrics(self) -> tuple[str, str]:
        """A name for this replica, and its metrics in Prometheus' text format."""
        text, _ = await self._server.render_metrics("")
        return f"{socket.gethostname()}:{os.getpid()}", text.decode()

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises: the server's own `/health`, which encodes."""
        if self._fatal is not None:
            raise RuntimeError(self._fatal)
        verdict = await self._server.health()
        if not verdict.healthy:
            raise RuntimeError(msgspec.json.encode(verdict.document).decode())

    def record_routing_stats(self) -> dict[str, Any]:
        """What the router weighs."""
        return {"backlog_s": self._server.load().backlog_s}

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of replicas is chosen by."""
        return {"backlog_s": self._server.load().backlog_s}

    async def __del__(self) -> None:
        """Ray Serve calls this once, after the replica's last request."""
        await self._server.drain()
        await self._stack.aclose()

    def _on_fatal(self, reason: str) -> None:
        self._fatal = reason
