"""The media of an OpenAI chat request: where they are, and what the engine shall call them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from encode_server.client import Item, Modality
from encode_server.client.media import Written
from encode_server.errors import BadRequest
from encode_server.runtime.outline import Outline, OutlineLimits

URL_PARTS = {"image_url": Modality.IMAGE, "video_url": Modality.VIDEO, "audio_url": Modality.AUDIO}
# With these, vLLM looks for another name than the `uuid`: a hash over both.
RENAMING = ("mm_processor_kwargs", "media_io_kwargs")

MAX_UUID = 512

LIMITS = OutlineLimits(4 << 20, 1 << 16)
"""Of a chat, beside its media and other long texts: what is decoded in one step, in 10 to 20 ms."""


@dataclass(frozen=True)
class MediaPart:
    """A media part of a message; `part` is the request's own object."""

    part: dict[str, Any]
    modality: Modality
    source: str | Written

    @property
    def content(self) -> bytes | memoryview:
        """What the source says, for names. Escapes of a long one are left: base64 needs none."""
        if isinstance(self.source, Written):
            return self.source.json[1:-1]
        return self.source.encode(errors="surrogatepass")


def media_parts(found: Outline[Any]) -> list[MediaPart]:
    """The media of a chat request, in order. Raises BadRequest for parts that are not what OpenAI's schema says.

    Parts that only name media the engine has seen before (`uuid` without content) are left out.
    """
    body = found.body
    if not isinstance(body, dict) or not isinstance(messages := body.get("messages"), list):
        raise BadRequest("the body is not a chat request: expected an object with a list `messages`")
    return [
        media for message in messages for part in _parts(message) if (media := _media(part, found.written)) is not None
    ]


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
        digest.update(found.content)
        name = found.part["uuid"] = prefix + digest.hexdigest()
        items.setdefault(found.modality, {})[name] = Item(found.source, fps=fps, uuid=name)
    return {modality: list(named.values()) for modality, named in items.items()}


def media_items(parts: list[MediaPart]) -> dict[Modality, list[Item]]:
    """What has to be encoded, the same media once, exactly as an engine will ask for it."""
    items: dict[Modality, dict[bytes, Item]] = {}
    for found in parts:
        items.setdefault(found.modality, {})[hashlib.sha256(found.content).digest()] = Item(found.source)
    return {modality: list(named.values()) for modality, named in items.items()}


def _parts(message: Any) -> Iterator[dict[str, Any]]:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        yield from (part for part in content if isinstance(part, dict))


def _media(part: dict[str, Any], written: Callable[[str], memoryview | None]) -> MediaPart | None:
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


def _source(text: str, written: Callable[[str], memoryview | None]) -> str | Written:
    json = written(text)
    return text if json is None else Written(json)
