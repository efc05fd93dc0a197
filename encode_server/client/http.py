"""`EncodeClient`: asks one encode server over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self

import msgspec

from encode_server.client.affinity import item_key
from encode_server.client.answers import error_from, from_json, from_safetensors
from encode_server.client.embedding import Embedding
from encode_server.client.errors import ProtocolError, ServerUnreachable
from encode_server.client.media import Media, Piece, items_json
from encode_server.client.passed_on import begin_call, passed_on
from encode_server.wire.answers import Delivered
from encode_server.wire.load import CONTENT_HEADER
from encode_server.wire.modality import Modality
from encode_server.wire.pools import Pool

CONNECT_TIMEOUT_S = 5.0
DEADLINE_MARGIN_S = 5.0
# Below uvicorn's 5 s, so that a connection isn't used again just as the server closes it.
KEEPALIVE_S = 4.0
SEND_BYTES = 512 * 1024

Transport = Literal["zmq", "nixl"]


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer, its body whole. `headers`: names in any case."""

    status: int
    body: bytearray
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Health:
    """The answer of `/health`: the HTTP status (200 or 503) and the document that explains it."""

    status: int
    document: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether the server encodes right now."""
        return self.status == 200


class EncodeClient:
    """An async client of one encode server; safe for any number of concurrent calls on one event loop.

    `base_url`: e.g. `http://encoder:30000`. `api_key`: sent as a bearer token. `timeout`: seconds a call may take, from
    its first byte to the last of the answer. Proxies named by the environment are not used: encoders are neighbours.

    Every call raises `EncodeServerError` when the server answers with an error, `ServerUnreachable` when there is no
    answer, `ProtocolError` for one that can't be read, and `TimeoutError` when the time is up. Cancelling a call closes
    its connection, which tells the server to drop the request.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout: float = 120.0) -> None:
        import httpx  # Half a second at the first import; a receiver alone needn't pay it.

        self.base_url = base_url.rstrip("/")
        self.timeout = timeout
        self.on_answer: Callable[[Mapping[str, str]], None] = lambda headers: None
        """Given the headers of every answer, which say how much work the server has."""
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {api_key}"} if api_key is not None else {},
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEPALIVE_S),
            trust_env=False,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connections. A second call does nothing."""
        await self._http.aclose()

    async def encode(
        self,
        media: Sequence[Media],
        modality: Modality | str,
        *,
        req_id: str | None = None,
        num_parts: int = 1,
        part_idx: int = 0,
        pool: Pool | str | None = None,
        timeout_s: float | None = None,
    ) -> Embedding:
        """The embedding of `media`: [tokens, dim], the rows of all items in order, in the server's dtype.

        `req_id`: the request's name, made by the server when None. `num_parts`, `part_idx`: which part of a request
        this is, when several encoders share it. `pool`: one vector for each item in place of its rows, so that [items,
        width] comes back: `mean`, `cls` or `model`. A pool that the model lacks is an `EncodeServerError` with status
        400. `timeout_s`: the deadline given to the server, seconds; the client then waits a little longer, so that the
        server's own answer to a missed deadline arrives.
        """
        fields = _fields(modality, req_id, num_parts, part_idx, pool)
        return from_safetensors(await self._post(media, fields, "application/octet-stream", timeout_s))

    async def encode_json(
        self,
        media: Sequence[Media],
        modality: Modality | str,
        *,
        req_id: str | None = None,
        num_parts: int = 1,
        part_idx: int = 0,
        pool: Pool | str | None = None,
        timeout_s: float | None = None,
    ) -> Embedding:
        """As `encode`, through the JSON answer: a third more bytes, and a copy; for checks and for debugging."""
        fields = _fields(modality, req_id, num_parts, part_idx, pool)
        return await asyncio.to_thread(from_json, await self._post(media, fields, "application/json", timeout_s))

    async def push(
        self,
        media: Sequence[Media],
        modality: Modality | str,
        *,
        prefill_host: str,
        embedding_port: int,
        req_id: str,
        num_parts: int = 1,
        part_idx: int = 0,
        pool: Pool | str | None = None,
        timeout_s: float | None = None,
        transport: Transport = "zmq",
    ) -> Delivered:
        """Has the embedding of `media` pushed to `tcp://prefill_host:embedding_port`, an `EmbeddingReceiver`'s address.

        Returns once the server has handed it over. `transport` "nixl": an `EmbeddingReceiver(nixl=True)` reads the
        embedding out of the server's memory; a server without NIXL pushes it as usual. The other arguments are those
        of `encode`.
        """
        fields = _fields(modality, req_id, num_parts, part_idx, pool)
        to: dict[str, object] = {
            "prefill_host": prefill_host,
            "embedding_port": embedding_port,
            "frames": "native",
            "transport": transport if transport != "zmq" else None,
        }
        return await self._deliver(media, fields | to, timeout_s)

    async def store(
        self,
        media: Sequence[Media],
        modality: Modality | str,
        *,
        req_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Delivered:
        """Has each item's embedding written into the server's `--ec-store`, named by the item's `uuid`.

        `media` are `Item`s with a `uuid`. Returns once all are in place. The other arguments are those of `encode`.
        """
        return await self._deliver(media, _fields(modality, req_id) | {"delivery": "ec_store"}, timeout_s)

    async def warm(
        self,
        media: Sequence[Media],
        modality: Modality | str,
        *,
        req_id: str | None = None,
        pool: Pool | str | None = None,
        timeout_s: float | None = None,
    ) -> Delivered:
        """Has `media` encoded into the server's cache, for a request that will ask for the same media. The answer
        describes the embedding without holding it. The arguments are those of `encode`."""
        return await self._deliver(media, _fields(modality, req_id, pool=pool) | {"delivery": "cache"}, timeout_s)

    async def health(self, *, timeout: float = 5.0) -> Health:
        """What `/health` says within `timeout` seconds. A sick or loading server (503) is an answer, not an error."""
        answer = await self.exchange("GET", "/health", timeout, None, {})
        try:
            return Health(answer.status, msgspec.json.decode(answer.body, type=dict[str, Any]))
        except (ValueError, RecursionError):
            raise error_from(answer.status, answer.body, None) from None

    async def _deliver(self, media: Sequence[Media], fields: dict[str, object], timeout_s: float | None) -> Delivered:
        body = await self._post(media, fields, "application/json", timeout_s)
        try:
            return msgspec.json.decode(body, type=Delivered)
        except (ValueError, RecursionError) as exc:
            raise ProtocolError(f"the answer cannot be read: {exc}") from exc

    async def _post(
        self, media: Sequence[Media], fields: dict[str, object], accept: str, timeout_s: float | None
    ) -> bytearray:
        given = {name: value for name, value in (fields | {"timeout_s": timeout_s}).items() if value is not None}
        pieces: list[Piece] = [b'{"mm_items":', *await items_json(media), b",", msgspec.json.encode(given)[1:]]
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(sum(map(len, pieces))),
            "Accept": accept,
        }
        if media:
            headers[CONTENT_HEADER] = item_key(media[0])[:64].hex()
        limit = self.timeout if timeout_s is None else timeout_s + DEADLINE_MARGIN_S
        answer = await self.exchange("POST", "/encode", limit, pieces, headers)
        if answer.status != 200:
            raise error_from(answer.status, answer.body, answer.headers.get("Retry-After"))
        return answer.body

    async def exchange(
        self, method: str, path: str, limit: float, pieces: Sequence[Piece] | None, headers: dict[str, str]
    ) -> Answer:
        """One request, its body in `pieces`, and its answer, whatever its status, in `limit` seconds.

        Raises `ServerUnreachable`, `TimeoutError`.
        """
        import httpx

        with begin_call(method, self.base_url + path) as call:
            more = {**passed_on(), **call.headers, **headers, "Accept-Encoding": "identity"}
            try:
                async with (
                    asyncio.timeout(limit),
                    self._http.stream(
                        method, path, content=None if pieces is None else _sent(pieces), headers=more
                    ) as response,
                ):
                    call.answered(response.status_code)
                    body = bytearray()
                    async for chunk in response.aiter_bytes():
                        body += chunk
                self.on_answer(response.headers)
                return Answer(response.status_code, body, response.headers)
            except TimeoutError as exc:
                raise TimeoutError(f"no answer from {self.base_url}{path} within {limit:g} s") from exc
            except httpx.RequestError as exc:
                connected = not isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout)
                message = f"{self.base_url}{path}: {exc or type(exc).__name__}"
                raise ServerUnreachable(message, connected=connected) from exc


def _fields(
    modality: Modality | str,
    req_id: str | None,
    num_parts: int = 1,
    part_idx: int = 0,
    pool: Pool | str | None = None,
) -> dict[str, object]:
    return {
        "modality": str(modality),
        "req_id": req_id,
        "num_parts": num_parts,
        "part_idx": part_idx,
        "pool": None if pool is None else str(pool),
    }


async def _sent(pieces: Sequence[Piece]) -> AsyncIterator[bytes]:
    # A large body in one go would be copied in one go, on the loop.
    for piece in pieces:
        for start in range(0, len(piece), SEND_BYTES):
            yield bytes(piece[start : start + SEND_BYTES])
