"""The HTTP routes of one server."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.responses import Response
from starlette.routing import Route

from encode_server import __version__
from encode_server.api import answers
from encode_server.api.encode import EncodeEndpoint
from encode_server.api.profiles import add_profile_routes
from encode_server.delivery.sglang.endpoints import add_sglang_routes
from encode_server.service.server import Server


def build_router(server: Server) -> APIRouter:
    """All routes of one server."""
    router = APIRouter()
    router.routes.append(Route("/encode", EncodeEndpoint(server), methods=["POST"]))

    @router.get("/health", summary="A real encode, or the progress of one")
    @router.get("/health_generate", include_in_schema=False)
    async def health() -> Response:
        verdict = await server.health()
        return Response(msgspec.json.encode(verdict.document), 200 if verdict.healthy else 503, media_type=answers.JSON)

    @router.get("/livez", summary="Whether the process answers")
    async def livez() -> dict[str, str]:
        return {"status": "alive", "version": __version__}

    @router.get("/readyz", summary="Whether requests are taken")
    async def readyz() -> Response:
        reason = server.not_ready()
        document = {"status": "not ready" if reason else "ready", "reason": reason}
        return Response(msgspec.json.encode(document), 503 if reason else 200, media_type=answers.JSON)

    @router.get("/metrics", summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(server.render_metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    add_profile_routes(router, server)
    if server.settings.protocol == "sglang":
        add_sglang_routes(router, server.registrations, server.destination_policy, server.keys.client)
    return router
