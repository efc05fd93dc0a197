"""The server's answers read: a safetensors body, a JSON body, an error."""

from __future__ import annotations

import msgspec

from encode_server.client.embedding import Embedding
from encode_server.client.errors import EncodeServerError, ProtocolError
from encode_server.wire.dtypes import FROM_SAFETENSORS
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality

MAX_ERROR_TEXT = 300


class _Tensor(msgspec.Struct):
    dtype: str
    shape: tuple[int, int]
    data_offsets: tuple[int, int]


class _Metadata(msgspec.Struct):
    req_id: str
    model: str
    modality: Modality
    items: str


class _Header(msgspec.Struct):
    embedding: _Tensor
    metadata: _Metadata = msgspec.field(name="__metadata__")


class _JsonAnswer(msgspec.Struct):
    req_id: str
    model: str
    modality: Modality
    dtype: str
    shape: tuple[int, int]
    items: list[ItemInfo]
    embedding: bytes


class _JsonError(msgspec.Struct):
    message: str
    code: str = "unknown"
    req_id: str | None = None


def from_safetensors(body: bytearray) -> Embedding:
    """The embedding in a safetensors body, sharing its memory. Raises `ProtocolError`."""
    view = memoryview(body)
    header_end = 8 + int.from_bytes(view[:8], "little")
    if len(view) < 8 or header_end > len(view):
        raise ProtocolError(f"the answer of {len(view)} bytes is not a whole safetensors body")
    try:
        header = msgspec.json.decode(view[8:header_end], type=_Header)
        items = msgspec.json.decode(header.metadata.items, type=list[ItemInfo])
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"the answer's safetensors header cannot be read: {exc}") from exc
    tensor, metadata = header.embedding, header.metadata
    begin, end = tensor.data_offsets
    if not 0 <= begin <= end <= len(view) - header_end:
        raise ProtocolError(f"the answer ends before its embedding does (bytes {begin} to {end})")
    return Embedding(
        req_id=metadata.req_id,
        model=metadata.model,
        modality=metadata.modality,
        dtype=FROM_SAFETENSORS.get(tensor.dtype, tensor.dtype),
        shape=tensor.shape,
        items=tuple(items),
        data=view[header_end + begin : header_end + end],
    )


def from_json(body: bytearray) -> Embedding:
    """The embedding in a JSON body, decoded from base64. Raises `ProtocolError`."""
    try:
        answer = msgspec.json.decode(body, type=_JsonAnswer)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"the answer cannot be read: {exc}") from exc
    return Embedding(
        req_id=answer.req_id,
        model=answer.model,
        modality=answer.modality,
        dtype=answer.dtype,
        shape=answer.shape,
        items=tuple(answer.items),
        data=memoryview(answer.embedding),
    )


def error_from(status: int, body: bytearray, retry_after: str | None) -> EncodeServerError:
    """The error in an answer; also one that a proxy on the way wrote in words of its own."""
    try:
        error = msgspec.json.decode(body, type=_JsonError)
    except (ValueError, RecursionError):
        text = bytes(body[: 4 * MAX_ERROR_TEXT]).decode(errors="replace").strip()
        error = _JsonError(message=text[:MAX_ERROR_TEXT] or "no explanation")
    try:
        seconds = float(retry_after) if retry_after is not None else None
    except ValueError:  # HTTP also allows a date; the server sends seconds.
        seconds = None
    return EncodeServerError(status, error.code, error.message, req_id=error.req_id, retry_after=seconds)
