"""Answers: the embedding as JSON or safetensors, piece by piece; the receipt of a delivery; errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pybase64
from starlette.responses import Response

from encode_server.errors import EncodeError
from encode_server.wire.answers import AnswerHead, Delivered, ErrorAnswer
from encode_server.wire.embedding import Encoded
from encode_server.wire.tensorfile import tensor_head

PIECE = 192 << 10  # bytes of an embedding in one piece; a multiple of 3, so that base64 pads at the end only
RAW_PIECE = 768 << 10  # the same where nothing is made per piece: a piece costs 30 microseconds to send
JSON = "application/json"
OCTETS = "application/octet-stream"


@dataclass(frozen=True)
class Body:
    """An answer's body. `size` in bytes is known before `pieces` makes them, one by one: the whole answer never lies in
    memory beside the embedding."""

    media_type: str
    size: int
    pieces: Iterator[bytes | memoryview]


def json_body(req_id: str, encoded: Encoded) -> Body:
    """`wire.answers.Answer` as JSON."""
    head = AnswerHead(**_described(req_id, encoded))
    before, after = msgspec.json.encode(head)[:-1] + b',"embedding":"', b'"}'
    size = len(before) + -(-encoded.nbytes // 3) * 4 + len(after)
    return Body(JSON, size, _framed(before, map(pybase64.b64encode, _aligned(encoded)), after))


def safetensors_body(req_id: str, encoded: Encoded) -> Body:
    """A safetensors file with one tensor, `embedding`, the rest of the answer in its metadata as strings."""
    metadata = {
        "req_id": req_id,
        "model": encoded.model,
        "modality": str(encoded.modality),
        "dtype": encoded.dtype,
        "shape": str(list(encoded.shape)),
        "items": msgspec.json.encode([item.info for item in encoded.items]).decode(),
    }
    head = tensor_head("embedding", encoded.dtype, encoded.shape, encoded.nbytes, metadata)
    return Body(OCTETS, len(head) + encoded.nbytes, _framed(head, _cut(encoded), b""))


def delivered(req_id: str, encoded: Encoded) -> Response:
    """The answer to a request whose embedding went to a destination."""
    return Response(msgspec.json.encode(Delivered(**_described(req_id, encoded))), media_type=JSON)


def nothing() -> Response:
    """The answer that tells SGLang that the embedding was delivered."""
    return Response(b"null", media_type=JSON)


def error_answer(error: EncodeError, req_id: str | None) -> Response:
    """The one shape of all errors."""
    body = ErrorAnswer(code=error.code, message=error.message, req_id=req_id)
    return Response(msgspec.json.encode(body), error.status, headers=error.headers, media_type=JSON)


def _described(req_id: str, encoded: Encoded) -> dict[str, Any]:
    """The fields of `AnswerHead`."""
    return {
        "req_id": req_id,
        "model": encoded.model,
        "modality": encoded.modality,
        "dtype": encoded.dtype,
        "shape": encoded.shape,
        "items": tuple(item.info for item in encoded.items),
    }


def _framed(before: bytes, between: Iterable[bytes | memoryview], after: bytes) -> Iterator[bytes | memoryview]:
    """`before` and `after` in one piece with what is next to them, where that is small."""
    waiting: bytes = before
    for piece in between:
        if len(waiting) + len(piece) <= PIECE:
            waiting += piece
        else:
            if waiting:
                yield waiting
            yield piece
            waiting = b""
    if waiting + after:
        yield waiting + after


def _cut(encoded: Encoded) -> Iterator[memoryview]:
    for item in encoded.items:
        for start in range(0, item.data.nbytes, RAW_PIECE):
            yield item.data[start : start + RAW_PIECE]


def _aligned(encoded: Encoded) -> Iterator[bytes | memoryview]:
    """The embedding in pieces of a multiple of three bytes, but for the last."""
    carry = b""
    for item in encoded.items:
        data = item.data
        if carry:
            missing = -len(carry) % 3
            carry, data = carry + bytes(data[:missing]), data[missing:]
            if len(carry) % 3:
                continue
            yield carry
        whole = data.nbytes // 3 * 3
        for start in range(0, whole, PIECE):
            yield data[start : min(start + PIECE, whole)]
        carry = bytes(data[whole:])
    if carry:
        yield carry
