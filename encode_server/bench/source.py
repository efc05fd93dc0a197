"""Requests to send: what a load consists of, and where a checking caller finds what it sent."""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from encode_server.bench.mix import Mix, Share
from encode_server.errors import StartupError
from encode_server.media import unique
from encode_server.media.unique import UniqueMedia
from encode_server.wire.modality import Modality

REPEATED = 64  # requests from which those that repeat are chosen
PICTURES = 8  # of each size: enough that no decoder profits from having just seen the same bits


@dataclass(frozen=True)
class LoadRequest:
    """A `POST` of JSON to `path`, its body in pieces. `items`: media in it.

    `kind` groups requests in the report. `key` names the content, whatever the counter in it, so that a caller who
    checks embeddings finds the one to expect.
    """

    kind: str
    key: str
    pieces: tuple[bytes, ...]
    items: int = 1
    path: str = "/encode"
    method: str = "POST"
    modality: str = ""
    accept: str = "application/octet-stream"


def request_of(copies: Sequence[UniqueMedia], *, key: str, kind: str | None = None, fields: bytes = b"") -> LoadRequest:
    """A request with the next copy of each medium. `fields`: more of the JSON object, e.g. `b'"timeout_s":5,'`."""
    pieces = [b'{%s"modality":"%s","mm_items":["' % (fields, copies[0].modality.encode())]
    for index, medium in enumerate(copies):
        if index:
            pieces.append(b'","')
        pieces += medium.data_uri()
    pieces.append(b'"]}')
    return LoadRequest(kind or copies[0].name, key, tuple(pieces), len(copies), modality=str(copies[0].modality))


def chat_of(copies: Sequence[UniqueMedia], *, key: str, model: str) -> LoadRequest:
    """The same media as a chat of one generated token, for an engine that encodes them itself: SGLang, vLLM."""
    pieces = [
        b'{"model":%s,"max_tokens":1,"temperature":0,"messages":[{"role":"user","content":['
        % json.dumps(model).encode()
    ]
    for medium in copies:
        field = b"%s_url" % medium.modality.encode()
        pieces += [b'{"type":"%s","%s":{"url":"' % (field, field), *medium.data_uri(), b'"}},']
    pieces.append(b'{"type":"text","text":"Say yes."}]}]}')
    return LoadRequest(
        copies[0].name,
        key,
        tuple(pieces),
        len(copies),
        path="/v1/chat/completions",
        accept="application/json",
        modality=str(copies[0].modality),
    )


def pool(what: str, seed: int = 0, count: int = PICTURES) -> list[UniqueMedia]:
    """The media called `what`: a number (`count` square JPEGs of that side in pixels), `video` or `audio`."""
    if what == Modality.VIDEO:
        return [unique.mp4()]
    if what == Modality.AUDIO:
        return [unique.wav()]
    if what.isdigit() and 1 <= int(what) <= 16384:
        return [unique.jpeg(int(what), int(what), seed * PICTURES + index) for index in range(count)]
    raise StartupError(f"{what!r} is no medium to send: takes video, audio or the side of an image in pixels")


def of_kind(what: str, items: int, seed: int = 0, chat_model: str | None = None) -> Iterator[LoadRequest]:
    """Requests without end with `items` media called `what`. `chat_model`: as chats with this model instead."""
    media = itertools.cycle(enumerate(pool(what, seed)))

    def stream() -> Iterator[LoadRequest]:
        while True:
            chosen = [next(media) for _ in range(items)]
            key = f"{what}:" + ",".join(str(index) for index, _ in chosen)
            copies = [medium for _, medium in chosen]
            yield request_of(copies, key=key) if chat_model is None else chat_of(copies, key=key, model=chat_model)

    return stream()


def mixed(mix: Mix, seed: int = 0, chat_model: str | None = None) -> Iterator[LoadRequest]:
    """Requests without end, drawn from `mix` by a seeded generator. Those that repeat are among the last `REPEATED`."""
    streams = [of_kind(share.media, share.items, seed, chat_model) for share in mix.shares]
    weights = [share.weight for share in mix.shares]
    choice = random.Random(seed)
    sent: deque[LoadRequest] = deque(maxlen=REPEATED)

    def stream() -> Iterator[LoadRequest]:
        while True:
            if sent and choice.random() < mix.repeat:
                yield choice.choice(sent)
                continue
            request = next(choice.choices(streams, weights)[0])
            sent.append(request)
            yield request

    return stream()


def requests(whats: Sequence[str], items: int = 1, seed: int = 0) -> Iterator[LoadRequest]:
    """Requests without end, `items` media in each; of several kinds a seeded random one each time."""
    return mixed(Mix(tuple(Share(what, items) for what in whats)), seed)
