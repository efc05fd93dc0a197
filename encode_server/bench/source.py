"""Requests to send: what a load consists of, and where a checking caller finds what it sent."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from encode_server.errors import StartupError
from encode_server.media import unique
from encode_server.media.unique import UniqueMedia
from encode_server.wire.modality import Modality

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
    accept: str = "application/octet-stream"


def request_of(copies: Sequence[UniqueMedia], *, key: str, kind: str | None = None, fields: bytes = b"") -> LoadRequest:
    """A request with the next copy of each medium. `fields`: more of the JSON object, e.g. `b'"timeout_s":5,'`."""
    pieces = [b'{%s"modality":"%s","mm_items":["' % (fields, copies[0].modality.encode())]
    for index, medium in enumerate(copies):
        if index:
            pieces.append(b'","')
        pieces += medium.data_uri()
    pieces.append(b'"]}')
    return LoadRequest(kind or copies[0].name, key, tuple(pieces), len(copies))


def pool(what: str, seed: int = 0, count: int = PICTURES) -> list[UniqueMedia]:
    """The media called `what`: a number (`count` square JPEGs of that side in pixels), `video` or `audio`."""
    if what == Modality.VIDEO:
        return [unique.mp4()]
    if what == Modality.AUDIO:
        return [unique.wav()]
    if what.isdigit() and 1 <= int(what) <= 16384:
        return [unique.jpeg(int(what), int(what), seed * PICTURES + index) for index in range(count)]
    raise StartupError(f"{what!r} is no medium to send: takes video, audio or the side of an image in pixels")


def requests(whats: Sequence[str], items: int = 1, seed: int = 0) -> Iterator[LoadRequest]:
    """Requests without end, `items` media in each; of several kinds a seeded random one each time."""
    pools = {what: itertools.cycle(enumerate(pool(what, seed))) for what in whats}
    choice = random.Random(seed)

    def stream() -> Iterator[LoadRequest]:
        while True:
            what = whats[0] if len(whats) == 1 else choice.choice(whats)
            chosen = [next(pools[what]) for _ in range(items)]
            key = f"{what}:" + ",".join(str(index) for index, _ in chosen)
            yield request_of([medium for _, medium in chosen], key=key)

    return stream()
