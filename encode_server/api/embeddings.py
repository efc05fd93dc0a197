"""`POST /v1/embeddings`: one vector for each image, video or audio, as clients of OpenAI's API ask for it.

Two forms are taken: `input` with URLs or data URIs and a `modality`, as Infinity has it, and chat messages with one
media part each, as vLLM has it. The request's life is that of `POST /encode`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pybase64
from starlette.types import Receive, Scope, Send

from encode_server.api import answers
from encode_server.api.body import BodyLimits, check_count, read_json
from encode_server.api.encode import HttpCaller, serve
from encode_server.api.schemas import EmbeddingData, EmbeddingsAnswer, EmbeddingsBody, Usage
from encode_server.errors import BadRequest
from encode_server.pipeline.pooling import floats
from encode_server.pipeline.request import MediaItem
from encode_server.runtime.charge import Charge
from encode_server.runtime.outline import Outline, Text
from encode_server.runtime.pools import run
from encode_server.service.caller import Ask
from encode_server.service.server import Server
from encode_server.wire.embedding import Encoded
from encode_server.wire.modality import Modality
from encode_server.wire.pools import POOLED_TOKENS, Pool

_FLOAT_CHARS = 25  # of a number in JSON and its comma, at most
_PARTS = {"image_url": Modality.IMAGE, "video_url": Modality.VIDEO, "audio_url": Modality.AUDIO}
"""Types of a message's parts that hold a URL, under the same name."""


class EmbeddingsEndpoint:
    """The ASGI application of `POST /v1/embeddings`."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await serve(self._server, EmbeddingsCaller, scope, receive, send)


class EmbeddingsCaller(HttpCaller):
    """See `service.caller.Caller`."""

    _body = EmbeddingsBody()

    async def read(self, charge: Charge) -> Ask:
        """See `Caller`."""
        settings = self._server.settings
        limits = BodyLimits(settings.max_body_mb << 20, settings.max_items, settings.least_rate_kb << 10)
        media: list[tuple[Modality | None, Text]]
        body, media = await read_json(
            self._request, self._server.pools.work, limits, charge, EmbeddingsBody, partial(_read, limits.max_items)
        )
        self._body = body
        modality = self._modality([kind for kind, _ in media])
        pool = Pool(body.pool) if body.pool is not None else None
        if pool is None:
            # The model's own vector is what it was trained to compare; other models have the mean of their rows.
            pool = Pool.MODEL if Pool.MODEL in await self._server.pools_of(modality) else Pool.MEAN
        items = [MediaItem(source) for _, source in media]
        return Ask(req_id=None, modality=modality, items=items, model=body.model, pool=pool)

    def answer_bytes(self, encoded: Encoded) -> int:
        """See `Caller`."""
        values = encoded.shape[0] * encoded.dim
        return values * (6 if self._body.encoding_format == "base64" else _FLOAT_CHARS)

    async def answer(self, req_id: str, encoded: Encoded, limit_s: float) -> None:
        """See `Caller`."""
        document = await run(self._server.pools.send, _document, req_id, encoded, self._body)
        pieces = (document[at : at + answers.PIECE] for at in range(0, len(document), answers.PIECE))
        await self.send(answers.Body(answers.JSON, len(document), pieces), req_id, limit_s)

    def _modality(self, kinds: list[Modality | None]) -> Modality:
        """The one modality of all items: as the items say, as the body says, or the only one that the model has."""
        said = {kind for kind in kinds if kind is not None}
        if self._body.modality is not None:
            said.add(_named(self._body.modality))
        if not said and self._server.encoding is not None:
            has = self._server.encoding.pipeline.modalities
            said = set(has) if len(has) == 1 else set()
        if len(said) != 1:
            raise BadRequest(
                "modality is missing: say image, video or audio"
                if not said
                else f"all items of a request have one modality, got {', '.join(sorted(said))}"
            )
        return said.pop()


def _document(req_id: str, encoded: Encoded, body: EmbeddingsBody) -> bytes:
    data: list[EmbeddingData] = []
    for index, item in enumerate(encoded.items):
        vector = floats(item.data, encoded.dtype)
        if body.normalized():
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        values: Any = vector.astype("<f4")
        values = pybase64.b64encode_as_string(values.tobytes()) if body.encoding_format == "base64" else values.tolist()
        data.append(EmbeddingData(index=index, embedding=values))
    tokens = sum(int(str(item.extra[POOLED_TOKENS])) for item in encoded.items)
    return msgspec.json.encode(
        EmbeddingsAnswer(
            id=f"embd-{req_id}",
            created=int(time.time()),
            model=encoded.model,
            data=data,
            usage=Usage(prompt_tokens=tokens, total_tokens=tokens),
        )
    )


def _read(max_items: int, found: Outline[EmbeddingsBody]) -> tuple[EmbeddingsBody, list[tuple[Modality | None, Text]]]:
    """The body, and its items, each with its modality where that shows. Raises BadRequest."""
    body = found.body
    if body.dimensions is not None:
        raise BadRequest("dimensions cannot be chosen: an encoder's vectors have one width")
    media = _media(body)
    check_count(len(media), max_items, "input")
    texts = [(kind, found.text(source)) for kind, source in media]
    return body, [(kind or _of_data_uri(text), text) for kind, text in texts]


def _media(body: EmbeddingsBody) -> list[tuple[Modality | None, str]]:
    if (body.input is None) == (body.messages is None):
        raise BadRequest("the body needs either input or messages")
    given: Any = body.messages if body.input is None else body.input
    if isinstance(given, str):
        return [(None, given)]
    if all(isinstance(one, str) for one in given):
        return [(None, one) for one in given]
    if all(isinstance(one, dict) for one in given):
        return [_from_conversation(given)]
    if all(isinstance(one, list) for one in given):
        return [_from_conversation(one) for one in given]
    raise BadRequest("input holds strings, the messages of one conversation, or several lists of messages")


def _of_data_uri(text: Text) -> Modality | None:
    start = (text if isinstance(text, str) else text[0])[:16].lower()
    kind = start[5:].partition("/")[0] if start[:5] == "data:" else ""
    return Modality(kind) if kind in set(Modality) else None


def _from_conversation(messages: list[Any]) -> tuple[Modality, str]:
    """The one media part of a conversation."""
    found = [media for message in messages for media in _parts(message)]
    if len(found) != 1:
        raise BadRequest(f"a conversation holds one image, video or audio to be encoded, got {len(found)}")
    return found[0]


def _parts(message: Any) -> list[tuple[Modality, str]]:
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise BadRequest("a message has a content: a list of parts")
    found = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get(kind) if isinstance(kind, str) else None
        if kind == "text" and isinstance(value, str) and not value.strip():
            continue
        if kind == "text":
            raise BadRequest("this server encodes no text, and a message holds some")
        field = "data" if kind == "input_audio" else "url"
        source = value.get(field) if isinstance(value, Mapping) else value
        modality = Modality.AUDIO if kind == "input_audio" else _PARTS.get(str(kind))
        if modality is None or not isinstance(source, str):
            raise BadRequest(f"a part has the type image_url, video_url, audio_url or input_audio, got {kind!r}")
        found.append((modality, source))
    return found


def _named(name: str) -> Modality:
    try:
        return Modality(name.lower())
    except ValueError:
        raise BadRequest(f"modality is {name!r}, expected image, video or audio") from None
