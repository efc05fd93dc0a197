"""The options of `encode-server route`."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any, get_args

from encode_server.client.encoders import Choice
from encode_server.errors import StartupError


@dataclass(frozen=True)
class RouteOptions:
    """Where requests come from and go to. Raises StartupError for a URL that is none."""

    engine_url: str
    encoder_url: tuple[str, ...]
    encoder_api_key: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    timeout_s: float = 60.0
    video_fps: float = 2.0
    max_body_mb: int = 128
    choice: Choice = "content"
    max_requests: int = 1024
    max_inflight_mb: int = 1024
    client_share: float = 0.5
    least_rate_kb: int = 64
    max_connections: int = 4096

    def __post_init__(self) -> None:
        for url in (self.engine_url, *self.encoder_url):
            if not url.startswith(("http://", "https://")):
                raise StartupError(f"{url!r} is not a URL: expected http://HOST:PORT")
        if min(self.max_requests, self.max_inflight_mb, self.max_body_mb, self.max_connections) < 1:
            raise StartupError("--max-requests, --max-inflight-mb, --max-body-mb, --max-connections: take 1 and more")
        if not 0 < self.client_share <= 1 or self.least_rate_kb < 0:
            raise StartupError("--client-share takes more than 0, up to 1; --least-rate-kb 0 and more")


def add_route_options(parser: ArgumentParser) -> None:
    """The command-line options, by the names of the fields."""
    default = RouteOptions("http://", ())

    def add(name: str, **more: Any) -> None:
        parser.add_argument(name, default=getattr(default, name[2:].replace("-", "_")), **more)

    parser.add_argument("--engine-url", required=True, metavar="URL", help="the engine: http://HOST:PORT")
    parser.add_argument(
        "--encoder-url", required=True, action="append", metavar="URL", help="an encode server; repeat for several"
    )
    add("--encoder-api-key", metavar="KEY", help="the key of the encode servers, if they want one")
    add("--host", help="address to listen on [%(default)s]")
    add("--port", type=int, help="port to listen on; 0 picks a free one [%(default)s]")
    add("--timeout-s", type=float, metavar="S", help="longest time for encoding a request's media [%(default)s]")
    add("--video-fps", type=float, metavar="N", help="frames per second the engine takes of a video [%(default)s]")
    add("--max-body-mb", type=int, metavar="MB", help="largest request body [%(default)s]")
    add("--max-requests", type=int, metavar="N", help="requests not answered yet; beyond it 429 [%(default)s]")
    add("--max-inflight-mb", type=int, metavar="MB", help="bodies of these; beyond it 429 [%(default)s]")
    add("--client-share", type=float, metavar="PART", help="most of both for one address beside others [%(default)s]")
    add("--least-rate-kb", type=int, metavar="KB", help="KiB a second at which bodies must arrive [%(default)s]")
    add("--max-connections", type=int, metavar="N", help="open connections [%(default)s]")
    add("--choice", choices=get_args(Choice), help="which encoder gets an item [%(default)s]")


def route_options(given: dict[str, Any]) -> RouteOptions:
    """The options from what the parser found."""
    return RouteOptions(**(given | {"encoder_url": tuple(given["encoder_url"])}))
