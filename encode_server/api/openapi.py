"""The OpenAPI document: what FastAPI cannot see of this server, and examples that run as they are."""

from __future__ import annotations

from typing import Any

from encode_server.api import answers
from encode_server.api.schemas import openapi_components

OPEN = frozenset({"/health", "/livez", "/readyz", "/metrics"})
"""Paths that need no API key."""

# A PNG of 56 x 56 pixels, grey from dark to light: small enough to be read in a page, and every vision tower takes it.
_IMAGE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAADgAAAA4CAAAAACN7WTCAAAAnElEQVR42p3BAQbCAABA0X+ciIiIGBERERFjRE"
    "REREREjIiIGCNGRERERERERHSn7vDfIyeRlyhIFCVKEmWJikQgUZWoSdQlGhJNiZZEW6IjEUpEEl2JnkRfYiAxlBhJjCUmElOJmcRcYiERSy"
    "wlVhJriY3EViKRSCV2EpnEXuIgcZQ4SZwlLhJXiZvEXeIh8ZR4SbwlPhJfiZ/0B3OF3Oy2ViSeAAAAAElFTkSuQmCC"
)

_EXAMPLES = {
    "image": {"summary": "One image", "value": {"modality": "image", "mm_items": [_IMAGE], "req_id": "example-1"}},
    "options": {
        "summary": "Two images, one of them resized",
        "value": {"modality": "image", "mm_items": [_IMAGE, {"url": _IMAGE, "max_pixels": 3136}], "timeout_s": 10},
    },
}

_EMBEDDINGS_EXAMPLES = {
    "input": {"summary": "URLs or data URIs", "value": {"input": [_IMAGE], "modality": "image"}},
    "messages": {
        "summary": "A chat message",
        "value": {
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": _IMAGE}}]}],
            "encoding_format": "base64",
        },
    },
}

_ERRORS = {
    400: "Malformed request, or media that cannot be decoded",
    401: "No API key, or a wrong one",
    403: "A source or destination that is not allowed",
    404: "The request names another model",
    408: "The body arrived too slowly",
    409: "The same part of the same request is in progress, or the uuid names other media in the store",
    413: "Above a limit",
    415: "The model lacks the modality",
    429: "Too busy; see Retry-After",
    500: "The encoder failed on an item",
    502: "The delivery failed",
    503: "Not ready",
    504: "The deadline passed",
    507: "The embedding store is full",
}


def complete(document: dict[str, Any], *, locked: bool) -> dict[str, Any]:
    """Add `POST /encode`, which is plain ASGI, to FastAPI's document, the schemas, and who needs a key.

    `locked`: the server has API keys; without any, a key may be given and means nothing.
    """
    references, schemas = openapi_components()
    document["paths"]["/encode"] = {"post": _encode(references)}
    document["paths"]["/v1/embeddings"] = {"post": _embeddings(references)}
    shown = document["paths"]["/status"]["get"]["responses"]["200"]
    shown["content"] = {answers.JSON: {"schema": references["Status"]}}
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas)
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer", "description": "One of --api-keys."}}
    needed: list[dict[str, list[str]]] = [{"key": []}] if locked else [{}, {"key": []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["security"] = [] if path in OPEN else needed
    return document


def _embeddings(references: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": "One vector for each image, video or audio",
        "operationId": "embeddings",
        "requestBody": {
            "required": True,
            "content": _json_of(references, "EmbeddingsBody", examples=_EMBEDDINGS_EXAMPLES),
        },
        "responses": {
            "200": {"description": "The vectors", "content": _json_of(references, "EmbeddingsAnswer")},
            **_errors(references),
        },
    }


def _json_of(references: dict[str, Any], name: str, **more: Any) -> dict[str, Any]:
    return {answers.JSON: {"schema": references[name], **more}}


def _errors(references: dict[str, Any]) -> dict[str, Any]:
    content = _json_of(references, "ErrorAnswer")
    return {str(status): {"description": text, "content": content} for status, text in _ERRORS.items()}


def _encode(references: dict[str, Any]) -> dict[str, Any]:
    form = {
        "type": "object",
        "required": ["modality", "file"],
        "properties": {
            "modality": {"enum": ["image", "video", "audio"]},
            "file": {"type": "array", "items": {"type": "string", "format": "binary"}},
            "req_id": {"type": "string", "minLength": 1, "maxLength": 512},
        },
    }
    return {
        "summary": "Encode images, videos or audio",
        "operationId": "encode",
        "requestBody": {
            "required": True,
            "content": _json_of(references, "EncodeBody", examples=_EXAMPLES)
            | {"multipart/form-data": {"schema": form}},
        },
        "responses": {
            "200": {
                "description": "The embedding, or the receipt of its delivery",
                "content": {
                    answers.JSON: {"schema": {"anyOf": [references["Answer"], references["Delivered"]]}},
                    answers.OCTETS: {"schema": {"type": "string", "format": "binary"}},
                },
            },
            **_errors(references),
        },
    }
