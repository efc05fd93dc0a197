"""What comes in over HTTP, and the schemas of what goes out."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from encode_server.errors import BadRequest
from encode_server.service.status import Status
from encode_server.wire.answers import Answer, Delivered, ErrorAnswer
from encode_server.wire.modality import Modality

MAX_INT = 2**53 - 1  # beyond it a number in JSON is not exact
MAX_ID = 512
MAX_PORTS = 64

PositiveInt = Annotated[int, msgspec.Meta(ge=1, le=MAX_INT)]
Identifier = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_ID)]
Port = Annotated[int, msgspec.Meta(ge=-MAX_INT, le=MAX_INT)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=1e9)]


class Sizing(msgspec.Struct, kw_only=True):
    """How an item is sized or sampled."""

    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    fps: Annotated[float, msgspec.Meta(gt=0, le=1e6)] | None = None
    num_frames: PositiveInt | None = None
    min_frames: PositiveInt | None = None
    max_frames: PositiveInt | None = None


class ItemBody(Sizing, kw_only=True):
    """A media item with options. `url`: http(s) or file URL, data URI, or bare base64. `uuid`: its name in a store.
    `preprocess_kwargs`, `max_long_side_pixel`, `detail`: as SGLang's prefill passes them on."""

    url: str
    content_hash: Annotated[str, msgspec.Meta(max_length=128)] | None = None
    preprocess_kwargs: Sizing | None = None
    max_long_side_pixel: PositiveInt | None = None
    detail: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    uuid: Annotated[str, msgspec.Meta(max_length=MAX_ID)] | None = None


class EncodeBody(msgspec.Struct, kw_only=True):
    """`POST /encode`. Unknown fields are ignored."""

    mm_items: Annotated[list[str | ItemBody], msgspec.Meta(min_length=1)]
    modality: Annotated[str, msgspec.Meta(max_length=64)]
    req_id: Identifier | None = None
    num_parts: PositiveInt = 1
    part_idx: Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)] = 0
    prefill_host: Annotated[str, msgspec.Meta(max_length=255)] | None = None
    embedding_port: Port | Annotated[list[Port], msgspec.Meta(min_length=1, max_length=MAX_PORTS)] | None = None
    delivery: Literal["ec_store", "cache"] | None = None
    frames: Literal["native", "sglang"] | None = None
    transport: Literal["zmq", "nixl"] | None = None
    timeout_s: Seconds | None = None
    time_stats_json: Any = None
    model: Annotated[str, msgspec.Meta(max_length=MAX_ID)] | None = None
    pool: Literal["mean", "cls", "model"] | None = None

    def checked_modality(self) -> Modality:
        """The modality. Raises BadRequest."""
        return modality_named(self.modality)


def modality_named(name: str) -> Modality:
    """The modality of that name, in any case. Raises BadRequest naming those there are."""
    try:
        return Modality(name.lower())
    except ValueError:
        raise BadRequest(f"modality is {name!r}, expected image, video or audio") from None


class EmbeddingsBody(msgspec.Struct, kw_only=True):
    """`POST /v1/embeddings`. Unknown fields are ignored.

    `input`: one media item or several, as URLs, data URIs or base64, all of one `modality`; or chat messages: those of
    one conversation, or a list of such lists. `messages`: the same messages, by vLLM's name. Each conversation holds
    one media part. `normalize` (vLLM: `use_activation`): vectors of length 1.
    """

    input: str | Annotated[list[str | dict[str, Any] | list[Any]], msgspec.Meta(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any] | list[Any]], msgspec.Meta(min_length=1)] | None = None
    modality: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    model: Annotated[str, msgspec.Meta(max_length=MAX_ID)] | None = None
    pool: Literal["mean", "cls", "model"] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    normalize: bool = True
    use_activation: bool | None = None
    dimensions: int | None = None

    def normalized(self) -> bool:
        """Whether vectors of length 1 are wanted."""
        return self.normalize if self.use_activation is None else self.use_activation


class EmbeddingData(msgspec.Struct, kw_only=True):
    """The vector of one item. `embedding`: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Usage(msgspec.Struct, kw_only=True):
    """Rows that the encoder made of all items."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(msgspec.Struct, kw_only=True):
    """One vector for each item, in the order of the items."""

    id: str
    created: int
    model: str
    usage: Usage
    object: Literal["list"] = "list"
    data: list[EmbeddingData]  # last: the answer is written item by item


def openapi_components() -> tuple[dict[str, Any], dict[str, Any]]:
    """References by type name, and the JSON schemas they point to."""
    types = (EncodeBody, EmbeddingsBody, Answer, EmbeddingsAnswer, Delivered, ErrorAnswer, Status)
    references, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return dict(zip((t.__name__ for t in types), references, strict=True)), components
