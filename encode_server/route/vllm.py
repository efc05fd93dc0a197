"""The proxy's face towards vLLM: media are encoded first, and named so that the engine finds the embeddings.

Where the encoder knows what sizes an item's place in the prompt, these metadata go to the engine in place of the media:
the engine then neither downloads nor preprocesses them. An embedding that does not come cannot be replaced by the
engine in that case, so the proxy tries the way out once before it relies on it, and has a way back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Set
from dataclasses import dataclass

import msgspec
from starlette.responses import Response

from encode_server.client import EncoderPool, Item, ItemInfo, Modality
from encode_server.client.media import Piece
from encode_server.route.chat import CHAT, MediaPart, name_parts, put_metadata, renames
from encode_server.route.engine import Engine
from encode_server.route.options import RouteOptions
from encode_server.route.telemetry import RouteMetrics
from encode_server.route.work import Document, concurrently
from encode_server.runtime.pools import Pace, run_sized
from encode_server.telemetry.logs import quoted
from encode_server.wire.metadata import Metadata
from encode_server.wire.names import PLACED_PREFIX, PUSHED_PREFIX

log = logging.getLogger(__name__)

TRUST_S = 600.0  # how long the engine is not asked again
DOUBT_S = 60.0  # how long media go along after metadata did not do
SAY_S = 60.0  # between two log lines of one kind
RENDER = b"/v1/chat/completions/render"
UNSAID = {"mm_payload": "none", "stream": False}
BRIEF = {"stream": False, "max_tokens": 1}
LONG_ANSWERS = ("max_completion_tokens", "stream_options", "n", "logprobs", "top_logprobs")


@dataclass(frozen=True)
class ForEngine:
    """A request for the engine, in pieces, which are given away as they are sent. `instead`: the request without
    anything of ours, when metadata stand in for media."""

    content: list[Piece]
    instead: list[Piece] | None = None


class VLLMFace:
    """Encodes, names and replaces the media of requests."""

    def __init__(self, encoders: EncoderPool, engine: Engine, metrics: RouteMetrics, options: RouteOptions) -> None:
        self._encoders, self._engine, self._metrics, self._options = encoders, engine, metrics, options
        self._receives = options.engine_receives
        self._told = frozenset(Modality(name) for name in options.engine_renames)
        self._renamed: dict[Modality, float] = {}  # until when the engine is not asked again
        self._named: dict[Modality, float] = {}
        self._placed: dict[Modality, float] = {}
        self._doubted: dict[Modality, float] = {}
        self._asking = asyncio.Lock()
        self._said: dict[str, float] = {}

    async def encoded(
        self, path: str, headers: Mapping[str, str], document: Document, parts: list[MediaPart]
    ) -> ForEngine:
        """The request, once its embeddings are where the engine looks for them."""
        raw, body = memoryview(document.raw), document.found.body
        if renames(body):
            self._leave(parts, "the request has mm_processor_kwargs or media_io_kwargs")
            return ForEngine([raw])
        renamed = self._told | self._known(frozenset(Modality), self._renamed)
        if left := [part for part in parts if part.modality in renamed]:
            self._leave(left, "the engine has media_io_kwargs of its own, and looks for other names")
            parts = [part for part in parts if part.modality not in renamed]
            if not parts:
                return ForEngine([raw])
        modalities = {part.modality for part in parts}
        may_place = self._may_place(modalities) if path == CHAT else set()
        prefix = (PLACED_PREFIX if may_place else PUSHED_PREFIX) if self._receives else ""
        named = await run_sized(document.pool, Pace.HASH, len(raw), name_parts, parts, self._options.video_fps, prefix)
        infos = await concurrently(named, self._push if self._receives else self._encoders.store)
        metadata: dict[str, Metadata | None] = {
            str(item.uuid): info.metadata if modality in may_place else None
            for modality, items in named.items()
            for item, info in zip(items, infos[modality], strict=True)
        }
        placed = put_metadata(body, parts, metadata) if may_place else frozenset[Modality]()
        if path == CHAT and not await self._finds(modalities, placed, headers, document, set(metadata)):
            self._leave(parts, "the engine does not find embeddings by the names of the proxy, or takes no metadata")
            return ForEngine([raw])
        for part in parts:
            self._metrics.media.labels(part.modality, "metadata" if part.modality in placed else "media").inc()
        return ForEngine(await document.written({}), [raw] if placed else None)

    async def forward(self, method: str, target: bytes, headers: Mapping[str, str], request: ForEngine) -> Response:
        """The engine's answer. An engine that fails with metadata is given the media."""
        answer = await self._engine.send(method, target, headers, request.content)
        if request.instead is None or answer.status_code < 500:
            return self._engine.passed_on(answer)
        status = answer.status_code
        await answer.aclose()
        answer = await self._engine.send(method, target, headers, request.instead)
        if answer.status_code < 400:
            self._metrics.metadata_refused.labels(str(status)).inc()
            log.warning("the engine answered %d to metadata, and took the media", status)
        return self._engine.passed_on(answer)

    def _may_place(self, modalities: Set[Modality]) -> Set[Modality]:
        """Metadata go to an engine with our connector only: another ends when an embedding does not come."""
        if self._receives is None or self._options.forward_media != "auto":
            return set()
        return modalities - self._known(modalities, self._doubted)

    async def _push(self, items: list[Item], modality: Modality) -> tuple[ItemInfo, ...]:
        host, _, port = (self._receives or "").rpartition(":")
        return await self._encoders.hand_over(
            items,
            modality,
            prefill_host=host.strip("[]"),
            embedding_port=int(port),
            transport=self._options.engine_transport,
        )

    async def _finds(
        self,
        modalities: Set[Modality],
        placed: Set[Modality],
        headers: Mapping[str, str],
        document: Document,
        names: set[str],
    ) -> bool:
        """Whether the engine finds the embeddings of this request. The engine is asked again only now and then."""
        if self._known(modalities, self._named) == modalities and self._known(placed, self._placed) == placed:
            return True
        async with self._asking:
            unsure = modalities - self._known(modalities, self._named)
            if unsure and not await self._keeps_names(unsure, headers, document, names):
                return False
            untried = placed - self._known(placed, self._placed)
            return not untried or await self._takes_metadata(untried, headers, document)

    async def _keeps_names(
        self, modalities: Set[Modality], headers: Mapping[str, str], document: Document, names: set[str]
    ) -> bool:
        """Whether the engine calls media as the proxy does; True where the engine does not say."""
        found = await self._names(headers, document)
        until = time.monotonic() + TRUST_S
        for modality in modalities:
            renamed = found is not None and names.isdisjoint(found.get(modality, ()))
            self._metrics.engine_renames.labels(modality).set(renamed)
            (self._renamed if renamed else self._named)[modality] = until
        return modalities == self._known(modalities, self._named)

    async def _takes_metadata(self, modalities: Set[Modality], headers: Mapping[str, str], document: Document) -> bool:
        """Try the request, for one token of an answer."""
        brief = await document.written(BRIEF, LONG_ANSWERS)
        status, answer = await self._engine.ask(CHAT.encode(), headers, brief)
        now = time.monotonic()
        if status == 200:
            self._placed.update(dict.fromkeys(modalities, now + TRUST_S))
            return True
        self._doubted.update(dict.fromkeys(modalities, now + DOUBT_S))
        self._metrics.metadata_refused.labels(str(status)).inc()
        log.warning("the engine answered %d to metadata: %s", status, quoted(answer[:300].decode(errors="replace")))
        return False

    @staticmethod
    def _known(modalities: Set[Modality], until: Mapping[Modality, float]) -> Set[Modality]:
        now = time.monotonic()
        return {modality for modality in modalities if until.get(modality, 0.0) > now}

    async def _names(self, headers: Mapping[str, str], document: Document) -> dict[str, list[str]] | None:
        """What the engine calls the media of a request, by modality; None when the engine does not say: only one that
        was started with `--enable-scale-out` does. Options of an engine may be hashed into the names."""
        status, answer = await self._engine.ask(RENDER, headers, await document.written(UNSAID))
        if status != 200:
            return None
        try:
            return msgspec.json.decode(answer, type=_Rendered).features.mm_hashes
        except (ValueError, RecursionError):
            return None

    def _leave(self, parts: list[MediaPart], why: str) -> None:
        for part in parts:
            self._metrics.media.labels(part.modality, "left").inc()
        now = time.monotonic()
        if now - self._said.get(why, -SAY_S) >= SAY_S:
            self._said[why] = now
            log.warning("media are left to the engine's own encoder: %s", why)


class _Features(msgspec.Struct):
    mm_hashes: dict[str, list[str]] = {}


class _Rendered(msgspec.Struct):
    features: _Features
