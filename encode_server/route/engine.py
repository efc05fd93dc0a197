"""The engine behind the proxy: requests go there as they came, answers come back as they arrive."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Mapping

import httpx
import msgspec
from starlette.responses import Response, StreamingResponse

from encode_server.errors import DeliveryFailed
from encode_server.telemetry.ids import current_ids
from encode_server.telemetry.request_ids import HEADER

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
KEEPALIVE_S = 4.0  # below uvicorn's 5 s: a connection is not used again just as it is closed
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

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def forward(
        self, method: str, path: str, query: str, headers: Mapping[str, str], content: bytes
    ) -> StreamingResponse:
        """Send a request on; returns when the engine has begun to answer. Raises DeliveryFailed when it does not."""
        kept = {name: value for name, value in headers.items() if name.lower() not in NOT_FORWARDED}
        if (ids := current_ids()) is not None:
            kept[HEADER.lower()] = ids.request_id
        url = httpx.URL(path=path, query=query.encode())
        request = self._http.build_request(method, url, headers=kept, content=content)
        try:
            answer = await self._http.send(request, stream=True)
        except httpx.RequestError as error:
            raise DeliveryFailed(f"the engine does not answer: {error or type(error).__name__}") from None
        response = StreamingResponse(_chunks(answer), answer.status_code)
        for name, value in answer.headers.multi_items():
            if name.lower() not in NOT_RETURNED:
                response.headers.append(name, value)
        return response

    async def healthy(self) -> bool:
        """Whether its `/health` answers 200."""
        with contextlib.suppress(httpx.HTTPError):
            return (await self._http.get("/health", timeout=CONNECT_TIMEOUT_S)).status_code == 200
        return False


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
