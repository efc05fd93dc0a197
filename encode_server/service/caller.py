"""Who asks for an encode, as a request's life sees the caller, whatever the transport."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from encode_server.errors import EncodeError
from encode_server.pipeline.request import MediaItem
from encode_server.runtime.charge import Charge
from encode_server.wire.embedding import Encoded
from encode_server.wire.modality import Modality
from encode_server.wire.pools import Pool


@dataclass(frozen=True)
class Ask:
    """What a caller asks for. `embedding_port`: one port, several (SGLang), or None. `timeout_s`: None where the caller
    does not say. `stored`: the embedding is to be written to the store. `cached`: the embedding stays in this server's
    cache, and the answer says only what it is like. `frames`: whose frames are pushed, None for those of --protocol.
    `traceparent`: the trace that the caller's engine names in the body (W3C Trace Context). `model`: the name by which
    the caller calls the model. `pool`: one vector for each item in place of its rows. `readable`: the destination reads
    a pushed embedding out of this server's memory, if it can be (NIXL)."""

    req_id: str | None
    modality: Modality
    items: list[MediaItem]
    num_parts: int = 1
    part_idx: int = 0
    prefill_host: str | None = None
    embedding_port: int | list[int] | None = None
    stored: bool = False
    cached: bool = False
    frames: Literal["native", "sglang"] | None = None
    timeout_s: float | None = None
    traceparent: str | None = None
    model: str | None = None
    pool: Pool | None = None
    readable: bool = False

    @property
    def destination(self) -> str:
        """Where the embedding goes, in one word: `answer`, `push`, `store` or `cache`."""
        if self.stored:
            return "store"
        if self.cached:
            return "cache"
        return "answer" if self.prefill_host is None else "push"

    @property
    def target(self) -> str | None:
        """The destination by name, for those who look after it; None where the embedding goes to no other process."""
        if self.prefill_host is None:
            return "store" if self.stored else None
        return f"{self.prefill_host}:{self.embedding_port}" if type(self.embedding_port) is int else self.prefill_host


class Caller(Protocol):
    """One request's transport. Everything that is sent to the caller is sent by these methods, once."""

    client: str
    """Who asks, for fairness: a digest of the API key, else the address."""

    declared_bytes: int
    """How large the body may be, known before it is read; nothing arrived yet, and perhaps never will."""

    asked_timeout_s: float | None
    """The deadline that the transport, not the body, names."""

    quiet: bool
    """Errors are for the caller alone, who may try another server: destinations are not told."""

    item_tokens: int | None
    """Encoder tokens that each of the request's items cost on average, once that is known: the answer says so."""

    stages: Mapping[str, float]
    """Seconds by stage, as far as the request has come: the answer says so."""

    async def read(self, charge: Charge) -> Ask:
        """Read and parse the body, charging what arrives before it is kept. Raises EncodeError, CallerGone."""

    def until_gone(self) -> AbstractAsyncContextManager[None]:
        """Cancel what runs inside and raise CallerGone when the caller leaves."""

    def answer_bytes(self, encoded: Encoded) -> int:
        """An upper bound of the answer's bytes, without making the answer."""

    async def answer(self, req_id: str, encoded: Encoded, limit_s: float) -> None:
        """Send the embedding, each piece within `limit_s` seconds. Raises DeliveryFailed."""

    async def confirm(self, req_id: str, encoded: Encoded, *, silent: bool) -> None:
        """Say that the embedding was delivered; `silent`: without a word about it, as SGLang expects."""

    async def refuse(self, error: EncodeError, req_id: str | None) -> None:
        """Say why there is no embedding, unless an answer has begun."""
