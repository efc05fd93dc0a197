"""Which requests take the shortcut past FastAPI's router."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.responses import PlainTextResponse

from encode_server.api.shortcut import Shortcut


@pytest.mark.parametrize(
    ("method", "path", "way"),
    [
        ("POST", "/encode", "short"),
        ("POST", "/encode?x=1", "short"),
        ("GET", "/encode", "long"),
        ("POST", "/encode/", "long"),
        ("POST", "/health", "long"),
    ],
)
def test_only_its_own_method_and_path(method: str, path: str, way: str) -> None:
    app = Shortcut(PlainTextResponse("long"), method="POST", path="/encode", endpoint=PlainTextResponse("short"))

    async def ask() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return (await client.request(method, path)).text

    assert asyncio.run(ask()) == way
