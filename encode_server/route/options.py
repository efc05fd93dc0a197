"""The options of `encode-server route`."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any, Literal, get_args

from encode_server.client.encoders import Choice
from encode_server.client.http import Transport
from encode_server.delivery.sglang.frames import SGLANG_TIMEOUT_S
from encode_server.errors import BadRequest, StartupError
from encode_server.route.fleet import split_url
from encode_server.wire.modality import Modality

ENV_PREFIX = "ENCODE_ROUTE_"
TIMEOUT_S = 60.0

Protocol = Literal["vllm", "sglang"]
ForwardMedia = Literal["auto", "always"]


@dataclass(frozen=True)
class RouteOptions:
    """Where requests come from and go to. `timeout_s` None: by protocol. Raises StartupError for what cannot work."""

    engine_url: str | None = None
    engine_receives: str | None = None
    engine_transport: Transport = "zmq"
    encoder_url: tuple[str, ...] = ()
    encoder_dns: tuple[str, ...] = ()
    protocol: Protocol = "vllm"
    encoder_api_key: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    timeout_s: float | None = None
    video_fps: float = 2.0
    forward_media: ForwardMedia = "auto"
    engine_renames: tuple[str, ...] = ()
    max_body_mb: int = 128
    max_waiting_mb: int = 4096
    choice: Choice = "content"
    register_url: tuple[str, ...] = ()
    advertise_host: str | None = None
    advertise_port: int | None = None
    register_allow: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    grace_s: float = 60.0
    log_level: str = "info"
    max_requests: int = 1024
    max_inflight_mb: int = 1024
    client_share: float = 0.5
    least_rate_kb: int = 64
    max_connections: int = 4096
    page: str = "on"
    tracing: str = "off"

    def __post_init__(self) -> None:
        if self.protocol == "vllm":
            if self.engine_url is None:
                raise StartupError("--engine-url is missing: the engine, http://HOST:PORT")
            if not self.encoder_url and not self.encoder_dns:
                raise StartupError("--encoder-url or --encoder-dns is missing: the encode servers, http://HOST:PORT")
        if self.engine_receives is not None and not _is_endpoint(self.engine_receives):
            raise StartupError(f"--engine-receives: got {self.engine_receives!r}, takes HOST:PORT")
        if self.engine_transport != "zmq" and self.engine_receives is None:
            raise StartupError("--engine-transport says how embeddings get to --engine-receives, which is missing")
        engine = () if self.engine_url is None else (self.engine_url,)
        for url in (*engine, *self.encoder_url, *self.encoder_dns):
            if not url.startswith(("http://", "https://")):
                raise StartupError(f"{url!r} is not a URL: expected http://HOST:PORT")
        for url in self.encoder_dns:
            try:
                split_url(url.rstrip("/"))
            except BadRequest as error:
                raise StartupError(f"--encoder-dns: {error.message}") from None
        if unknown := set(self.engine_renames) - set(Modality):
            raise StartupError(f"--engine-renames: got {', '.join(sorted(unknown))}, takes image, video, audio")
        if self.max_waiting_mb < self.max_body_mb:
            raise StartupError("--max-waiting-mb is below --max-body-mb: a body of full size could never come in")
        if min(self.max_requests, self.max_inflight_mb, self.max_body_mb, self.max_connections) < 1:
            raise StartupError("--max-requests, --max-inflight-mb, --max-body-mb, --max-connections: take 1 and more")
        if not 0 < self.client_share <= 1 or self.least_rate_kb < 0:
            raise StartupError("--client-share takes more than 0, up to 1; --least-rate-kb 0 and more")

    @property
    def encode_timeout_s(self) -> float:
        """Longest time for encoding a request's media."""
        return self.timeout_s or (SGLANG_TIMEOUT_S if self.protocol == "sglang" else TIMEOUT_S)


def add_route_options(parser: ArgumentParser) -> None:
    """The command-line options, by the names of the fields. Each may come from `ENCODE_ROUTE_NAME` instead."""
    default = RouteOptions("http://", encoder_url=("http://",))

    def add(name: str, **more: Any) -> None:
        field = name[2:].replace("-", "_")
        variable = ENV_PREFIX + field.upper()
        more["help"] = f"{more['help']} [{getattr(default, field) if 'url' not in field else 'none'}; {variable}]"
        parser.add_argument(name, default=os.environ.get(variable) or getattr(default, field), **more)

    def add_list(name: str, what: str, metavar: str = "URL") -> None:
        variable = ENV_PREFIX + name[2:].replace("-", "_").upper()
        more = f"{what}; repeat for several [none; {variable}, comma-separated]"
        parser.add_argument(name, action="append", metavar=metavar, help=more)

    add("--protocol", choices=get_args(Protocol), help="the engine that is served")
    parser.add_argument(
        "--engine-url",
        default=os.environ.get(ENV_PREFIX + "ENGINE_URL") or None,
        metavar="URL",
        help=f"the engine, http://HOST:PORT; sglang: needed only to serve its chat API [none; {ENV_PREFIX}ENGINE_URL]",
    )
    add(
        "--engine-receives",
        metavar="HOST:PORT",
        help="vllm: where the engine's EncodeServerConnector receives embeddings; none: they go to the encoders' store",
    )
    add(
        "--engine-transport",
        choices=get_args(Transport),
        help="vllm: how embeddings get there; nixl: the engine reads encoders' memory (connector option `nixl`)",
    )
    add_list("--encoder-url", "an encode server; sglang: encoders may register themselves as well")
    add_list("--encoder-dns", "http://NAME:PORT, an encode server at each of the name's addresses")
    add("--encoder-api-key", metavar="KEY", help="the key of the encode servers, if they want one")
    add("--host", help="address to listen on")
    add("--port", type=int, help="port to listen on; 0 picks a free one")
    add("--timeout-s", type=float, metavar="S", help="longest time for encoding media; none: 60, sglang 170")
    add("--video-fps", type=float, metavar="N", help="frames per second that vLLM takes of a video")
    add(
        "--forward-media",
        choices=get_args(ForwardMedia),
        help="vllm: whether media go to the engine; auto: metadata in their place where the model's form is known",
    )
    add_list(
        "--engine-renames",
        "vllm: a modality whose items the engine gives names of its own: it was started with --media-io-kwargs",
        "MODALITY",
    )
    add("--max-body-mb", type=int, metavar="MB", help="largest request body")
    add("--max-waiting-mb", type=int, metavar="MB", help="sglang: bodies held while they are encoded; more wait unread")
    add("--max-requests", type=int, metavar="N", help="requests not answered yet; beyond it 429")
    add("--max-inflight-mb", type=int, metavar="MB", help="bodies of these; beyond it 429")
    add("--client-share", type=float, metavar="PART", help="most of both for one address beside others")
    add("--least-rate-kb", type=int, metavar="KB", help="KiB a second at which bodies must arrive")
    add("--max-connections", type=int, metavar="N", help="open connections")
    add("--choice", choices=get_args(Choice), help="which encoder gets an item")
    add_list("--register-url", "sglang: a bootstrap server to register this proxy with, as if it were an encoder")
    add("--advertise-host", metavar="HOST", help="host to register; none: this host's address towards the bootstrap")
    add("--advertise-port", type=int, metavar="PORT", help="port to register; none: --port")
    add_list(
        "--register-allow",
        "network or host of encoders beside private ones, or of ranks on other hosts",
        "NET",
    )
    add_list("--api-keys", "a key that callers of /v1 need as `Authorization: Bearer`", "KEY")
    add("--ssl-certfile", metavar="PEM", help="certificate chain: serve HTTPS")
    add("--ssl-keyfile", metavar="PEM", help="its private key")
    add("--grace-s", type=float, metavar="S", help="after SIGTERM: time for streams and parts in progress to end")
    add("--page", choices=("on", "off"), help="the page at /; what it shows, /status, wants a key of --api-keys")
    add("--tracing", choices=("off", "otlp"), help="spans by OTLP over HTTP, where OTEL_EXPORTER_OTLP_ENDPOINT says")
    add("--log-level", choices=("debug", "info", "warning", "error"), help="least severe level logged")


LISTS = ("encoder_url", "encoder_dns", "register_url", "register_allow", "api_keys", "engine_renames")


def route_options(given: dict[str, Any]) -> RouteOptions:
    """The options from what the parser found. Raises StartupError."""
    lists = {name: _several(name, given.get(name)) for name in LISTS}
    return RouteOptions(**(given | lists))


def _is_endpoint(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port) < 65536


def _several(name: str, given: list[str] | None) -> tuple[str, ...]:
    variable = ENV_PREFIX + name.upper()
    text = os.environ.get(variable)
    if given is None and name == "api_keys" and text is not None and not text.strip(" ,"):
        # A secret that was not set must not open the server.
        raise StartupError(f"{variable} is empty: give a key, or unset it to serve everybody")
    values = given if given is not None else [text or ""]
    return tuple(part.strip() for value in values for part in value.split(",") if part.strip())
