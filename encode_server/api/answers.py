"""Answers: the embedding as JSON or safetensors, the receipt of a delivery, and errors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging

import msgspec
import pybase64
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from encode_server.api.schemas import Answer, Delivered, ErrorAnswer
from encode_server.errors import EncodeError
from encode_server.wire.embedding import Encoded
from encode_server.wire.tensorfile import tensor_head

log = logging.getLogger(__name__)

PIECE = 256 << 10  # bytes
JSON = "application/json"
OCTETS = "application/octet-stream"


class LargeAnswer(Response):
    """An embedding, sent piece by piece for as long as its reader takes each within `limit_s` seconds.

    `hold` counts it until then: in one piece it would wait on the heap, uncounted, for a reader that may never come.
    """

    def __init__(
        self, content: bytes, media_type: str, hold: contextlib.AbstractContextManager[None], limit_s: float
    ) -> None:
        super().__init__(content, media_type=media_type)
        self._hold, self._limit_s = hold, limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI. Raises TooBusy, before anything is sent, when too much waits for readers already."""
        with self._hold:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            size = len(self.body)
            for start in range(0, size, PIECE):
                piece = self.body[start : start + PIECE]
                try:
                    async with asyncio.timeout(self._limit_s):
                        await send({"type": "http.response.body", "body": piece, "more_body": start + PIECE < size})
                except TimeoutError:
                    log.warning("a client took nothing of its answer for %g s: closing", self._limit_s)
                    return


def json_answer(req_id: str, encoded: Encoded) -> bytes:
    """The JSON answer. Copies the whole embedding: of a large one, call it in a worker thread."""
    return msgspec.json.encode(
        Answer(
            req_id=req_id,
            model=encoded.model,
            modality=encoded.modality,
            dtype=encoded.dtype,
            shape=encoded.shape,
            items=[item.info for item in encoded.items],
            embedding=pybase64.b64encode_as_string(encoded.contiguous()),
        )
    )


def safetensors_answer(req_id: str, encoded: Encoded) -> bytes:
    """A safetensors file with one tensor, `embedding`, the rest of the answer in its metadata as strings.

    Copies the whole embedding: of a large one, call it in a worker thread.
    """
    metadata = {
        "req_id": req_id,
        "model": encoded.model,
        "modality": str(encoded.modality),
        "dtype": encoded.dtype,
        "shape": json.dumps(encoded.shape),
        "items": msgspec.json.encode([item.info for item in encoded.items]).decode(),
    }
    head = tensor_head("embedding", encoded.dtype, encoded.shape, encoded.nbytes, metadata)
    return b"".join([head, *(item.data for item in encoded.items)])


def delivered(req_id: str, encoded: Encoded) -> Response:
    """The answer to a request whose embedding went to a destination."""
    receipt = Delivered(
        req_id=req_id,
        model=encoded.model,
        modality=encoded.modality,
        dtype=encoded.dtype,
        shape=encoded.shape,
        items=[item.info for item in encoded.items],
    )
    return Response(msgspec.json.encode(receipt), media_type=JSON)


def nothing() -> Response:
    """The answer that tells SGLang that the embedding was delivered."""
    return Response(b"null", media_type=JSON)


def error_answer(error: EncodeError, req_id: str | None) -> Response:
    """The one shape of all errors."""
    body = ErrorAnswer(code=error.code, message=error.message, req_id=req_id)
    return Response(msgspec.json.encode(body), error.status, headers=error.headers, media_type=JSON)
