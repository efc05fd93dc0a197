"""Profiles: routes that an engine or an operator calls."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from encode_server.api.answers import JSON
from encode_server.errors import Forbidden
from encode_server.runtime.bodies import read_small
from encode_server.service.server import Server

MAX_FORWARDS = 256


class ProfileOptions(msgspec.Struct):
    """`/start_profile`: it ends after `num_steps` forwards, or before that at `/stop_profile` or at a bound of
    `engine.profiler`."""

    output_dir: str | None = None
    num_steps: Annotated[int, msgspec.Meta(ge=1, le=MAX_FORWARDS)] = MAX_FORWARDS


def add_profile_routes(router: APIRouter, server: Server) -> None:
    """Add them to the server's other routes."""

    async def start_profile(request: Request) -> Response:
        server.keys.client(request)
        options = await read_small(request, ProfileOptions)
        if options.output_dir is not None:
            raise Forbidden("output_dir is not the caller's to choose: traces go to this server's --profile-dir")
        await server.start_profile(options.num_steps)
        return Response(msgspec.json.encode({"status": "profiling"}), media_type=JSON)

    async def stop_profile(request: Request) -> Response:
        server.keys.client(request)
        files = await server.stop_profile()
        return Response(msgspec.json.encode({"status": "stopped", "files": files}), media_type=JSON)

    for method in ("GET", "POST"):  # as SGLang has them; a route each, or two operations would share an id
        router.add_api_route("/start_profile", start_profile, methods=[method], summary="Profile all ranks")
        router.add_api_route("/stop_profile", stop_profile, methods=[method], summary="Write the ranks' traces")
