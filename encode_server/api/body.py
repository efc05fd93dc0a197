"""Read a request's body, JSON or multipart, within its limit."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import msgspec
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from encode_server.api.schemas import EncodeBody, ItemBody, Sizing
from encode_server.errors import BadRequest, TooLarge
from encode_server.pipeline.request import MediaItem
from encode_server.runtime.bodies import chunks, declared_length, read_all
from encode_server.runtime.charge import Charge
from encode_server.runtime.outline import Outline, OutlineLimits, outline
from encode_server.runtime.pools import Pace, run, run_sized
from encode_server.service.caller import Ask
from encode_server.wire.items import ItemOptions
from encode_server.wire.pools import Pool

T = TypeVar("T")
R = TypeVar("R")

FORM_TEXT = 16 << 20  # bytes of one text field: they are decoded on the loop
LOW_DETAIL = 512  # pixels a side, as OpenAI's API has it
JSON_BYTES = 1 << 20  # of a JSON body beside its media: decoding them holds the interpreter for some milliseconds
ITEM_BYTES = 4 << 10  # of them, for each item: two names, options, the URL or what stands for the media
ITEM_STRINGS = 64


class _InMemory(MultiPartParser):
    """Files stay in memory, which the limit of the body bounds: a full disk fails no request."""

    spool_max_size = sys.maxsize


@dataclass(frozen=True)
class BodyLimits:
    """Of one body: its bytes, the media items in it, and the least bytes a second at which it arrives."""

    max_bytes: int
    max_items: int
    least_rate: int


def json_limits(max_items: int) -> OutlineLimits:
    """What a JSON body may hold beside its media."""
    return OutlineLimits(max(JSON_BYTES, ITEM_BYTES * max_items), ITEM_STRINGS * max(max_items, 64))


async def read_encode(request: Request, pool: Executor, limits: BodyLimits, charge: Charge) -> Ask:
    """What the body of `POST /encode` asks for, each piece charged as it arrives.

    Raises BadRequest when it is malformed or holds more items than `limits` say, TooLarge above their bytes (before
    reading on), TooSlow, TooBusy, CallerGone.
    """
    max_items = limits.max_items
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        check_length(request, limits.max_bytes)
        body, media = await _read_form(request, pool, limits, charge)
        check_count(len(media), max_items)
        return _ask(body, media)
    return await read_json(request, pool, limits, charge, EncodeBody, partial(_from_document, max_items))


def _from_document(max_items: int, found: Outline[EncodeBody]) -> Ask:
    check_count(len(found.body.mm_items), max_items)
    return _ask(found.body, [_media_item(item, found) for item in found.body.mm_items])


def _ask(body: EncodeBody, media: list[MediaItem]) -> Ask:
    return Ask(
        req_id=body.req_id,
        modality=body.checked_modality(),
        items=media,
        num_parts=body.num_parts,
        part_idx=body.part_idx,
        prefill_host=body.prefill_host,
        embedding_port=body.embedding_port,
        stored=body.delivery == "ec_store",
        cached=body.delivery == "cache",
        frames=body.frames,
        readable=body.transport == "nixl",
        timeout_s=body.timeout_s,
        traceparent=_traceparent(body.time_stats_json),
        model=body.model,
        pool=None if body.pool is None else Pool(body.pool),
    )


async def read_json(
    request: Request,
    pool: Executor,
    limits: BodyLimits,
    charge: Charge,
    kind: type[T],
    then: Callable[[Outline[T]], R],
) -> R:
    """What `then`, in a thread of the pool, makes of the JSON body as `kind`. Raises as `read_encode` does."""
    check_length(request, limits.max_bytes)
    body = await read_all(request, limits.max_bytes, limits.least_rate, charge, pool)

    def parsed() -> R:
        try:
            return then(outline(body.whole(), kind, json_limits(limits.max_items)))
        finally:
            body.close()

    return await run_sized(pool, Pace.JSON, len(body), parsed)


def check_length(request: Request, max_bytes: int) -> None:
    """Raise TooLarge for a body that says that it is larger than `max_bytes`."""
    if declared_length(request) > max_bytes:
        raise TooLarge(f"the body has {declared_length(request)} bytes, at most {max_bytes} are taken")


def check_count(items: int, most: int, field: str = "mm_items") -> None:
    """Raise BadRequest for more than `most` items in `field`."""
    if items > most:
        raise BadRequest(f"{field} holds {items} items, at most {most} are taken")


def _media_item(item: str | ItemBody, found: Outline[EncodeBody]) -> MediaItem:
    if isinstance(item, str):
        return MediaItem(found.text(item))
    return MediaItem(found.text(item.url), _options(item), item.content_hash, item.uuid)


def _options(item: ItemBody) -> ItemOptions:
    sizing = {name: getattr(item, name) for name in Sizing.__struct_fields__}
    if (beside := item.preprocess_kwargs) is not None:
        sizing |= {name: getattr(beside, name) for name, value in sizing.items() if value is None}
    sides = [item.max_long_side_pixel] if item.max_long_side_pixel is not None else []
    if item.detail == "low":
        sides.append(LOW_DETAIL)
    return ItemOptions(**sizing, max_side=min(sides, default=None))


def _traceparent(time_stats: Any) -> str | None:
    """The trace of SGLang's request, where its prefill was told to trace."""
    for key in ("trace_ctx", "root_span_context", "traceparent"):
        time_stats = time_stats.get(key) if isinstance(time_stats, dict) else None
    return time_stats if isinstance(time_stats, str) else None


def _form_type(request: Request) -> Headers:
    """The content type with its boundary alone: a charset would choose the codec, and some take quadratic time."""
    _, options = parse_options_header(request.headers["content-type"])
    boundary = options.get(b"boundary", b"")
    if not boundary or b'"' in boundary or b"\\" in boundary:
        raise BadRequest("the form is malformed: its content type names no usable boundary")
    return Headers(raw=[(b"content-type", b'multipart/form-data; boundary="' + boundary + b'"')])


async def _read_form(
    request: Request, pool: Executor, limits: BodyLimits, charge: Charge
) -> tuple[EncodeBody, list[MediaItem]]:
    """Files in any field become items, in order; the other fields are those of the JSON body, as text.

    `fields` holds per-item options for all files as well (`-F max_pixels=100000`); `uuid` and `content_hash` come once
    per item.
    """
    try:
        arriving = chunks(request, limits.max_bytes, limits.least_rate, charge)
        form = await _InMemory(_form_type(request), arriving, max_part_size=FORM_TEXT).parse()
    except MultiPartException as error:
        raise BadRequest(f"the form is malformed: {error.message}") from None
    texts = {key: value for key, value in form.multi_items() if isinstance(value, str)}
    urls = [value for key, value in form.multi_items() if key == "mm_items" and isinstance(value, str)]
    uploads = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    media: list[str | bytes] = [*urls, *await asyncio.gather(*(run(pool, upload.file.read) for upload in uploads))]
    if not media:
        raise BadRequest("the form holds no file and no mm_items: send one, e.g. with curl -F file=@image.jpg")
    fields = {key: value for key, value in texts.items() if key != "mm_items" and value != ""}
    try:
        body = msgspec.convert(fields | {"mm_items": [""]}, EncodeBody, strict=False)
        shared = msgspec.convert(fields | {"url": ""}, ItemBody, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(f"the form's fields are not those expected: {error}") from None
    options = _options(shared)
    uuids, hashes = (_once_per_item(form, field, len(media)) for field in ("uuid", "content_hash"))
    return body, [MediaItem(*item) for item in zip(media, [options] * len(media), hashes, uuids, strict=True)]


def _once_per_item(form: FormData, field: str, items: int) -> list[str | None]:
    values: list[str | None] = [value for value in form.getlist(field) if isinstance(value, str)]
    if values and len(values) != items:
        raise BadRequest(f"the form holds {len(values)} of {field} for {items} items, expected one each")
    return values or [None] * items
