"""Answers: the embedding as JSON or safetensors, the receipt of a delivery, and errors."""

from __future__ import annotations

import base64
import json

import msgspec
from starlette.responses import Response

from encode_server.api.schemas import Answer, Delivered, ErrorAnswer
from encode_server.errors import EncodeError
from encode_server.pipeline.request import Encoded
from encode_server.tensorfile import tensor_head

JSON = "application/json"
OCTETS = "application/octet-stream"


def json_answer(req_id: str, encoded: Encoded) -> bytes:
    """The JSON answer. Copies the whole embedding: call it in a worker thread."""
    return msgspec.json.encode(
        Answer(
            req_id=req_id,
            model=encoded.model,
            modality=encoded.modality,
            dtype=encoded.dtype,
            shape=encoded.shape,
            items=[item.info for item in encoded.items],
            embedding=base64.b64encode(encoded.contiguous()).decode("ascii"),
        )
    )


def safetensors_answer(req_id: str, encoded: Encoded) -> bytes:
    """A safetensors file with one tensor, `embedding`, the rest of the answer in its metadata as strings.

    Copies the whole embedding: call it in a worker thread.
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
