"""The engine behind the proxy: requests go there as they came, answers come back as they arrive."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import AsyncIterator, Mapping

import httpx
import msgspec
from starlette.responses import Response, StreamingResponse

from encode_server.client.http import SEND_BYTES
from encode_server.client.media import Piece
from encode_server.client.passed_on import Call, begin_call
from encode_server.errors import DeliveryFailed
from encode_server.telemetry.ids import current_ids
from encode_server.telemetry.request_ids import HEADER

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 4.0  # below uvicorn's 5 s: a connection is not used again just as it is closed
ADMITTED_S = 60.0  # for so long the engine is not asked again whether it knows somebody
MAX_ADMITTED = 1024
CREDENTIALS = ("authorization", "api-key", "x-api-key", "cookie")
EVENTS = "text/event-stream"
# Of one connection only (RFC 9110, 7.6.1), or computed anew.
NOT_FORWARDED = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "host",
        "content-length",
    }
)
# The proxy's own answers name the request already.
NOT_RETURNED = NOT_FORWARDED - {"content-length"} | {HEADER.lower()}


class Engine:
    """An HTTP client of the engine."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/"),
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),  # an answer takes as long as it takes
            limits=httpx.Limits(max_connections=None, keepalive_expiry=KEEPALIVE_S),
            trust_env=False,
        )
        self._origin = str(self._http.base_url).rstrip("/")
        self._prefix = self._http.base_url.raw_path.rstrip(b"/")
        self._admitted: dict[bytes, float] = {}  # until when, by a digest of the credentials

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def refusal(self, headers: Mapping[str, str]) -> Response | None:
        """What the engine answers to whom it doesn't know, None to others: asked of its list of models, which costs
        nothing. Raises DeliveryFailed when it does not answer."""
        shown = {name: value for name in CREDENTIALS if (value := headers.get(name)) is not None}
        known = hashlib.sha256(repr(sorted(shown.items())).encode()).digest()
        now = time.monotonic()
        if self._admitted.get(known, 0.0) > now:
            return None
        with begin_call("GET", str(self._http.base_url.join("v1/models"))) as call:
            try:
                answer = await self._http.get(
                    "/v1/models", headers=shown | dict(call.headers), timeout=CONNECT_TIMEOUT_S
                )
            except httpx.RequestError as error:
                raise DeliveryFailed(f"the engine does not answer: {error or type(error).__name__}") from None
            call.answered(answer.status_code)
        if answer.status_code in (401, 403):
            more = {name: answer.headers[name] for name in ("www-authenticate",) if name in answer.headers}
            return Response(answer.content, answer.status_code, more, answer.headers.get("content-type"))
        if answer.status_code < 500:
            while len(self._admitted) >= MAX_ADMITTED:
                del self._admitted[next(iter(self._admitted))]
            self._admitted[known] = now + ADMITTED_S
        return None

    async def send(
        self, method: str, target: bytes, headers: Mapping[str, str], content: list[Piece]
    ) -> httpx.Response:
        """Send a request on, `target` as it came. The pieces of its body are taken from `content`, which keeps none.
        Returns when the engine has begun to answer; the caller closes the answer, or passes it on. Raises
        DeliveryFailed when the engine does not answer."""
        kept = {name: value for name, value in headers.items() if name.lower() not in NOT_FORWARDED}
        if (ids := current_ids()) is not None:
            kept[HEADER.lower()] = ids.request_id
        call = begin_call(method, self._origin + target.partition(b"?")[0].decode("ascii", "replace"))
        kept.update(call.headers)
        size = sum(map(len, content))
        if size or method not in ("GET", "DELETE"):
            kept["content-length"] = str(size)
        request = self._http.build_request(method, "/", headers=kept, content=_given_away(content) if size else None)
        request.extensions["target"] = self._prefix + target
        try:
            answer = await self._http.send(request, stream=True)
        except httpx.RequestError as error:
            call.end(error)
            raise DeliveryFailed(f"the engine does not answer: {error or type(error).__name__}") from None
        except BaseException as error:
            call.end(error)
            raise
        call.answered(answer.status_code)
        answer.stream = _EndsCall(answer.stream, call)
        return answer

    def passed_on(self, answer: httpx.Response) -> StreamingResponse:
        """The engine's answer as it arrives."""
        response = StreamingResponse(_chunks(answer), answer.status_code)
        for name, value in answer.headers.multi_items():
            if name.lower() not in NOT_RETURNED:
                response.headers.append(name, value)
        return response

    async def ask(self, target: bytes, headers: Mapping[str, str], content: list[Piece]) -> tuple[int, bytes]:
        """A question of the proxy's own, with the credentials of a caller: status and body of the answer. `content` as
        in `send`. Raises DeliveryFailed."""
        answer = await self.send("POST", target, headers, content)
        try:
            return answer.status_code, await answer.aread()
        except httpx.RequestError as error:
            raise DeliveryFailed(f"the engine broke off its answer: {error or type(error).__name__}") from None
        finally:
            await answer.aclose()

    async def healthy(self) -> bool:
        """Whether its `/health` answers 200."""
        with contextlib.suppress(httpx.HTTPError):
            return (await self._http.get("/health", timeout=CONNECT_TIMEOUT_S)).status_code == 200
        return False


class _EndsCall(httpx.AsyncByteStream):
    """The body of an answer, whose call ends with it."""

    def __init__(self, body: httpx.AsyncByteStream | httpx.SyncByteStream, call: Call) -> None:
        assert isinstance(body, httpx.AsyncByteStream)
        self._body, self._call = body, call

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._body:
                yield chunk
        except BaseException as error:
            self._call.end(error)
            raise

    async def aclose(self) -> None:
        """See AsyncByteStream."""
        self._call.end()
        await self._body.aclose()


async def _given_away(content: list[Piece]) -> AsyncIterator[bytes]:
    """The body, given away: the request lives as long as its answer, and would keep the body as long."""
    while content:
        piece = content.pop(0)
        for start in range(0, len(piece), SEND_BYTES):  # in one go, a large one would be copied on the loop
            yield bytes(piece[start : start + SEND_BYTES])


async def _chunks(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    except httpx.RequestError as error:
        log.error("the engine broke off its answer: %s", error or type(error).__name__)
        if not answer.headers.get("content-type", "").startswith(EVENTS):
            raise
        yield b"data: " + msgspec.json.encode(openai_error(502, "the engine broke off its answer")) + b"\n\n"
    finally:
        # Also when the caller went away: closing the connection makes the engine stop.
        await answer.aclose()


def openai_error(status: int, message: str) -> dict[str, object]:
    """An error as OpenAI's clients read it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """The response to a request that ended here."""
    content = msgspec.json.encode(openai_error(status, message))
    return Response(content, status, headers=headers, media_type="application/json")
