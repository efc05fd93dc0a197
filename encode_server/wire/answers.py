"""The documents that `POST /encode` answers with, for the server and for `client`."""

from __future__ import annotations

import msgspec

from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality


class AnswerHead(msgspec.Struct, kw_only=True, frozen=True):
    """What an answer says beside the embedding."""

    req_id: str
    model: str
    modality: Modality
    dtype: str
    shape: tuple[int, int]
    items: tuple[ItemInfo, ...]


class Answer(AnswerHead, kw_only=True, frozen=True):
    """The embedding in JSON: `embedding` is base64 of row-major little-endian `dtype` values of `shape`."""

    embedding: str


class Delivered(AnswerHead, kw_only=True, frozen=True):
    """The embedding was pushed to its destination, stored, or put into the cache."""

    status: str = "delivered"


class ErrorAnswer(msgspec.Struct, kw_only=True):
    """Every error's body."""

    status: str = "error"
    code: str
    message: str
    req_id: str | None = None
