"""What is fuzzed: each target takes any bytes, and raises nothing but a bug."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import uvicorn
from starlette.requests import Request

from encode_server.api.body import BodyLimits, read_encode
from encode_server.delivery.folder import check_identifier
from encode_server.errors import EncodeError
from encode_server.media.audio import decode_audio
from encode_server.media.image import decode_image
from encode_server.media.inline import decode_inline
from encode_server.media.limits import MediaLimits
from encode_server.media.policy import UrlPolicy
from encode_server.media.video import decode_video
from encode_server.media.web import _parse as parse_url
from encode_server.route.app import _target as route_target
from encode_server.route.chat import CHAT, MESSAGES, RESPONSES, media_items, media_parts, name_parts, put_metadata
from encode_server.runtime.caller import CallerGone
from encode_server.runtime.charge import free
from encode_server.runtime.connections import ConnectionLimits, guarded
from encode_server.runtime.outline import OutlineLimits, outline
from encode_server.wire.frames import decode_header
from encode_server.wire.tensorfile import expected_size, head_metadata

LIMITS = MediaLimits(
    max_bytes=1 << 20,
    max_pixels=250_000,
    max_frames=200,
    max_audio_seconds=10,
    max_decoded_bytes=32 << 20,
    decode_seconds=5,
)
BODY = BodyLimits(max_bytes=1 << 20, max_items=16, least_rate=0)
_LOOP = asyncio.new_event_loop()
_POOL = ThreadPoolExecutor(1)


def json_body(data: bytes) -> None:
    """`POST /encode` as JSON."""
    _body(data, b"application/json")


def form_body(data: bytes) -> None:
    """`POST /encode` as a form, the boundary being `x`."""
    _body(data, b"multipart/form-data; boundary=x")


def _body(data: bytes, kind: bytes) -> None:
    pieces = [data[at : at + 100] for at in range(0, len(data), 100)] or [b""]

    async def receive() -> Any:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    async def read() -> None:
        request = Request({"type": "http", "headers": [(b"content-type", kind)]}, receive)
        with contextlib.suppress(EncodeError, CallerGone):
            ask = await read_encode(request, _POOL, BODY, free)
            assert 1 <= len(ask.items) <= BODY.max_items

    _LOOP.run_until_complete(read())


class _Transport(asyncio.Transport):
    """Takes what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close

    def write(self, data: Any) -> None:
        assert not self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


_LISTENER = ConnectionLimits(head_bytes=2000, headers=20, pipelined=3)
_CONFIG = uvicorn.Config(_echo, http=guarded(_LISTENER), ws="none", log_config=None, access_log=False, lifespan="off")
_CONFIG.load()


def http(data: bytes) -> None:
    """What a connection sends, in pieces whose length the first byte gives."""
    state = uvicorn.server.ServerState()
    step = max(1, data[0] if data else 1)

    async def connection() -> None:
        protocol = _CONFIG.http_protocol_class(config=_CONFIG, server_state=state, app_state={}, _loop=_LOOP)
        transport = _Transport()
        protocol.connection_made(transport)
        for at in range(1, len(data), step):
            protocol.data_received(data[at : at + step])
            assert len(protocol.pipeline) <= _LISTENER.pipelined
            assert len(protocol.headers or ()) <= _LISTENER.headers + 1
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        for task in list(state.tasks):
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)

    _LOOP.run_until_complete(connection())


def urls(data: bytes) -> None:
    """URLs of media, data URIs, names in a store, addresses."""
    text = data.decode("utf-8", "replace")
    with contextlib.suppress(EncodeError):
        url = parse_url(text)
        address = UrlPolicy([]).check_host(url.raw_host.decode("ascii"), url.port or 80)
        assert address is None or address.is_global
    with contextlib.suppress(EncodeError):
        decode_inline((text,), LIMITS)
    with contextlib.suppress(EncodeError):
        check_identifier(text)
        assert "/" not in text and text not in (".", "..")


def route(data: bytes) -> None:
    """A chat request at the proxy, and the path of any other."""
    with contextlib.suppress(EncodeError):
        found: Any = outline(data, object, OutlineLimits(200, 50))
        for path in (CHAT, RESPONSES, MESSAGES):
            with contextlib.suppress(EncodeError):
                media_items(media_parts(found, path))
        if parts := media_parts(found):
            name_parts(parts, 2.0)
            put_metadata(found.body, parts, {part.part["uuid"]: {} for part in parts[:1]})
            msgspec.json.decode(b"".join(found.restored(msgspec.json.encode(found.body))))
    with contextlib.suppress(EncodeError):
        path = data.decode("latin-1")
        request = SimpleNamespace(scope={"path": "/v1/" + path, "raw_path": b"/v1/" + data, "query_string": b""})
        assert route_target(request) == b"/v1/" + data
        assert ".." not in path.split("/")


def frames(data: bytes) -> None:
    """What a receiver reads of a push, and the heads of stored embeddings."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        decode_header(data)
    expected_size(data)
    head_metadata(data)


def image(data: bytes) -> None:
    """An image."""
    with contextlib.suppress(EncodeError):
        decode_image(data, LIMITS)


def video(data: bytes) -> None:
    """A video, two of its frames."""
    with contextlib.suppress(EncodeError):
        decode_video(data, lambda info: sorted({0, info.total_num_frames - 1}), LIMITS)


def audio(data: bytes) -> None:
    """Audio, at another rate."""
    with contextlib.suppress(EncodeError):
        decode_audio(data, 8000, LIMITS)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target for target in (json_body, form_body, http, urls, route, frames, image, video, audio)
}
