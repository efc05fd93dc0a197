"""The media of a chat request: where they are, what the engine shall call them, and what may stand in their place.

Three kinds of request hold media: OpenAI's chat completions and responses, and Anthropic's messages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from encode_server.client import Item, Modality
from encode_server.client.media import Piece, Written
from encode_server.errors import BadRequest
from encode_server.runtime.outline import Outline, OutlineLimits
from encode_server.wire.metadata import Metadata

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"

URL_PARTS = {"image_url": Modality.IMAGE, "video_url": Modality.VIDEO, "audio_url": Modality.AUDIO}
KINDS = {**URL_PARTS, "input_audio": Modality.AUDIO}
EMBEDS = {modality: f"{modality}_embeds" for modality in Modality}
# With these, vLLM looks for another name than the `uuid`: a hash over both.
RENAMING = ("mm_processor_kwargs", "media_io_kwargs")

MAX_UUID = 512
MAX_DEPTH = 8  # lists of content in lists of content

LIMITS = OutlineLimits(4 << 20, 1 << 16)
"""Of a chat, beside its media and other long texts: what is decoded in one step, in 10 to 20 ms."""

WrittenAs = Callable[[str], memoryview | None]
"""`Outline.written` of a request."""


@dataclass(frozen=True)
class MediaPart:
    """A media part of a message; `part` is the request's own object."""

    part: dict[str, Any]
    modality: Modality
    source: str | Written

    @property
    def content(self) -> Sequence[Piece]:
        """What the source says, for names. Escapes of a long one are left: base64 needs none."""
        if isinstance(self.source, Written):
            return self.source.inside
        return [self.source.encode(errors="surrogatepass")]


def media_parts(found: Outline[Any], path: str = CHAT) -> list[MediaPart]:
    """The media of a request to `path`, in order. Raises BadRequest for parts that are not what its schema says.

    Parts that only name media the engine has seen before (`uuid` without content) are left out.
    """
    body = found.body
    if path == RESPONSES:
        if not isinstance(body, dict):
            raise BadRequest("the body is not an object")
        return _media_of(_nested(body.get("input")), _of_responses, found)
    if not isinstance(body, dict) or not isinstance(messages := body.get("messages"), list):
        raise BadRequest("the body is not a chat request: expected an object with a list `messages`")
    if path == MESSAGES:
        return _media_of(_nested(messages), _of_messages, found)
    return _media_of((part for message in messages for part in _parts(message)), _of_chat, found)


def renames(body: dict[str, Any]) -> bool:
    """Whether options of the request make the engine look for other names than those set here."""
    return any(body.get(field) for field in RENAMING)


def name_parts(parts: list[MediaPart], video_fps: float, prefix: str = "") -> dict[Modality, list[Item]]:
    """Set each part's `uuid`, and say what has to be encoded; the same media once. Hashes all of it. `prefix`: of the
    names.

    A name covers the content (for a URL: the URL) and the caller's own `uuid`, so that nobody can put an embedding in
    the place of another's media.
    """
    items: dict[Modality, dict[str, Item]] = {}
    for found in parts:
        fps = video_fps if found.modality is Modality.VIDEO else None
        digest = hashlib.sha256(repr((str(found.modality), fps, found.part.get("uuid"))).encode())
        for piece in found.content:
            digest.update(piece)
        name = found.part["uuid"] = prefix + digest.hexdigest()
        items.setdefault(found.modality, {})[name] = Item(found.source, fps=fps, uuid=name)
    return {modality: list(named.values()) for modality, named in items.items()}


def media_items(parts: list[MediaPart]) -> dict[Modality, list[Item]]:
    """What has to be encoded, the same media once, exactly as an engine will ask for it."""
    items: dict[Modality, dict[tuple[object, ...], Item]] = {}
    for found in parts:
        media = next((found.part[kind] for kind in URL_PARTS if isinstance(found.part.get(kind), dict)), found.part)
        detail, side = media.get("detail"), media.get("max_long_side_pixel")
        item = Item(
            found.source,
            detail=detail if isinstance(detail, str) else None,
            max_long_side_pixel=side if isinstance(side, int) and side > 0 else None,
        )
        digest = hashlib.sha256()
        for piece in found.content:
            digest.update(piece)
        same = (digest.digest(), item.detail, item.max_long_side_pixel)
        items.setdefault(found.modality, {})[same] = item
    return {modality: list(different.values()) for modality, different in items.items()}


def put_metadata(
    body: dict[str, Any], parts: list[MediaPart], metadata: Mapping[str, Metadata | None]
) -> frozenset[Modality]:
    """Put metadata, by `uuid`, in the place of the media of a chat request. Returns the modalities of which no media
    are left. vLLM takes no request that holds media and metadata of one modality: then all media of that modality
    stay."""
    known = {id(found.part) for found in parts}
    stay = {found.modality for found in parts if metadata.get(found.part["uuid"]) is None}
    for message in body["messages"]:
        for part in _parts(message):
            if id(part) not in known and isinstance(kind := part.get("type"), str) and kind in KINDS:
                stay.add(KINDS[kind])
    replaced = [found for found in parts if found.modality not in stay]
    for found in replaced:
        kind, name = EMBEDS[found.modality], found.part["uuid"]
        found.part.clear()
        found.part.update({"type": kind, kind: metadata[name], "uuid": name})
    return frozenset(found.modality for found in replaced)


def _media_of(
    parts: Iterable[dict[str, Any]],
    read: Callable[[dict[str, Any], WrittenAs], MediaPart | None],
    found: Outline[Any],
) -> list[MediaPart]:
    return [media for part in parts if (media := read(part, found.written)) is not None]


def _parts(message: Any) -> Iterator[dict[str, Any]]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        yield from (part for part in content if isinstance(part, dict))


def _nested(content: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """The parts of a message, of a tool's result in it, and so on."""
    if isinstance(content, list) and depth < MAX_DEPTH:
        for part in content:
            if isinstance(part, dict):
                yield part
                yield from _nested(part.get("content"), depth + 1)
                yield from _nested(part.get("output"), depth + 1)


def _of_chat(part: dict[str, Any], written: WrittenAs) -> MediaPart | None:
    kind, name = part.get("type"), part.get("uuid")
    if name is not None and (not isinstance(name, str) or len(name) > MAX_UUID):
        raise BadRequest(f"uuid is not a string of at most {MAX_UUID} characters")
    if kind == "input_audio":
        audio = part.get(kind)
        if audio is None:
            return None
        if not isinstance(audio, dict) or not isinstance(audio.get("data"), str):
            raise BadRequest("input_audio is not an object with base64 `data`")
        return MediaPart(part, Modality.AUDIO, _source(audio["data"], written))
    if not isinstance(kind, str):
        return None
    if kind not in URL_PARTS or part.get(kind) is None:
        return None
    url = part[kind].get("url") if isinstance(part[kind], dict) else part[kind]
    if not isinstance(url, str):
        raise BadRequest(f"{kind} is not an object with a `url`")
    return MediaPart(part, URL_PARTS[kind], _source(url, written))


def _of_responses(part: dict[str, Any], written: WrittenAs) -> MediaPart | None:
    kind, url = part.get("type"), part.get("image_url")
    if kind not in ("input_image", "image_url") or url is None:
        return None
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise BadRequest(f"image_url of an {kind} is not a URL")
    return MediaPart(part, Modality.IMAGE, _source(url, written))


def _of_messages(part: dict[str, Any], written: WrittenAs) -> MediaPart | None:
    source = part.get("source")
    if part.get("type") != "image" or source is None:
        return None
    if not isinstance(source, dict):
        raise BadRequest("source of an image is not an object")
    inline = source.get("type") == "base64"
    given = source.get("data" if inline else "url")
    if not isinstance(given, str):
        raise BadRequest("source of an image holds neither a `url` nor base64 `data`")
    if not inline:
        return MediaPart(part, Modality.IMAGE, _source(given, written))
    media_type = source.get("media_type", "image/png")
    if isinstance(media_type, str) and written(media_type) is not None:
        raise BadRequest("media_type of an image is too long")
    # As SGLang writes it: the same media must go to the same encoder.
    return MediaPart(part, Modality.IMAGE, _source(given, written, f"data:{media_type};base64,"))


def _source(text: str, written: WrittenAs, prefix: str = "") -> str | Written:
    json = written(text)
    return prefix + text if json is None else Written(json, msgspec.json.encode(prefix)[1:-1])
