"""The page at `/`: what a server or a proxy shows to people. Files alone: no template, no build step, nothing from
elsewhere.

The files hold nothing of the server's, so they need no API key. What the page shows comes from `/status` and `/encode`,
which ask for one.
"""

from __future__ import annotations

import hashlib
import mimetypes
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

FOLDER = "/page"
HEADERS = {
    # Scripts and styles are files of this folder; media that a person drops are blobs of the browser's.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; worker-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; media-src blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[BaseRoute]:
    """Routes of the page and of its files, which are read once."""
    files = {entry.name: entry.read_bytes() for entry in resources.files(__name__).joinpath("assets").iterdir()}
    index = _File("index.html", files.pop("index.html"))
    return [
        Route("/", index.answer, methods=["GET"], include_in_schema=False),
        *(
            Route(f"{FOLDER}/{name}", _File(name, content).answer, methods=["GET"], include_in_schema=False)
            for name, content in files.items()
        ),
    ]


class _File:
    """One file, and the answers that it makes."""

    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        self._headers = HEADERS | {"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def answer(self, request: Request) -> Response:
        """The file, or 304 where the browser has it."""
        if request.headers.get("if-none-match") == self._headers["ETag"]:
            return Response(status_code=304, headers=self._headers)
        return Response(self._content, headers=self._headers, media_type=self._type)
