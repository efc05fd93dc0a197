"""The HTTP routes of one server."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from encode_server import __version__
from encode_server.api import answers
from encode_server.api.embeddings import EmbeddingsEndpoint
from encode_server.api.encode import EncodeEndpoint
from encode_server.api.profiles import add_profile_routes
from encode_server.delivery.sglang.endpoints import add_sglang_routes
from encode_server.page import page_routes
from encode_server.runtime.pools import run
from encode_server.service.info import models, server_info
from encode_server.service.server import Server
from encode_server.service.status import status


def build_router(server: Server) -> APIRouter:
    """All routes of one server."""
    router = APIRouter()
    router.routes.append(Route("/encode", EncodeEndpoint(server), methods=["POST"]))
    router.routes.append(Route("/v1/embeddings", EmbeddingsEndpoint(server), methods=["POST"]))

    @router.get("/health", summary="A real encode, or the progress of one")
    @router.get("/health_generate", include_in_schema=False)
    async def health() -> Response:
        verdict = await server.health()
        return Response(msgspec.json.encode(verdict.document), 200 if verdict.healthy else 503, media_type=answers.JSON)

    @router.get("/livez", summary="Whether the process answers, and can go on")
    async def livez() -> Response:
        document = {"status": "failed" if server.fatal else "alive", "version": __version__}
        return Response(msgspec.json.encode(document), 503 if server.fatal else 200, media_type=answers.JSON)

    @router.get("/readyz", summary="Whether requests are taken")
    async def readyz() -> Response:
        reason = server.unavailable()
        document = {"status": "not ready" if reason else "ready", "reason": reason}
        return Response(msgspec.json.encode(document), 503 if reason else 200, media_type=answers.JSON)

    @router.get("/metrics", summary="Prometheus metrics")
    async def metrics(request: Request) -> Response:
        text, content_type = await server.render_metrics(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    @router.get("/server_info", summary="Versions, model and options")
    async def info(request: Request) -> Response:
        server.keys.client(request)
        document = await run(server.pools.work, server_info, server)
        return Response(msgspec.json.encode(document), media_type=answers.JSON)

    @router.get("/v1/models", summary="The model and its names")
    async def list_models(request: Request) -> Response:
        server.keys.client(request)
        return Response(msgspec.json.encode(models(server)), media_type=answers.JSON)

    @router.get("/status", summary="State, bounds and the last quarter of an hour")
    async def show_status(request: Request) -> Response:
        server.keys.client(request)
        document = msgspec.json.encode(status(server))
        return Response(document, headers={"Cache-Control": "no-store"}, media_type=answers.JSON)

    if server.settings.page == "on":
        router.routes.extend(page_routes())
    add_profile_routes(router, server)
    if server.settings.protocol == "sglang":
        add_sglang_routes(
            router,
            server.sglang_deliveries,
            server.destination_policy,
            server.keys.client,
            server.timeout_s(None),
            mooncake=server.settings.mooncake_host is not None,
        )
    return router
