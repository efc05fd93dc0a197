"""A way to one endpoint that passes neither FastAPI's router nor its handlers."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class Shortcut:
    """An ASGI middleware: requests of `method` to `path` go straight to `endpoint`, an ASGI application that answers
    its own errors. On the long way each request passes nine more calls, for 60 microseconds."""

    def __init__(self, app: ASGIApp, *, method: str, path: str, endpoint: ASGIApp) -> None:
        self._app, self._method, self._path, self._endpoint = app, method, path, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["path"] == self._path and scope["method"] == self._method:
            await self._endpoint(scope, receive, send)
        else:
            await self._app(scope, receive, send)
