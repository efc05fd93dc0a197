"""A JSON body without its long strings, so that no step of its decoding holds the interpreter for long.

A decoder of JSON holds the interpreter lock until it returns, also in a thread: for 120 MB, 130 to 390 ms, in which the
event loop stands still. What is large in an honest body is the base64 of its media. These strings are cut out before
decoding, and decoded by themselves, in pieces; what remains is small, or the body is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from encode_server.errors import BadRequest
from encode_server.runtime.arriving import Raw
from encode_server.runtime.bodies import from_json

LONG = 1 << 10  # bytes: longer strings are cut out
TEXT = 64 << 10  # bytes: of longer strings the text is given in pieces
PIECE = 1 << 20  # bytes that are searched or decoded in one step: a millisecond
BACKSLASHES = 64  # in a row, before a quote
ESCAPE = 6  # bytes of the longest escape, `\u002b`

T = TypeVar("T")
Text = str | tuple[str, ...]
"""A string, or the pieces of a long one, in order."""


@dataclass(frozen=True)
class OutlineLimits:
    """Of a JSON body: its bytes beside strings above `LONG`, each of which counts as `LONG`, and its strings. A smaller
    body may hold any number of strings."""

    max_bytes: int
    max_strings: int


@dataclass(frozen=True)
class Outline(Generic[T]):
    """A body as `T`, stand-ins where its long strings were. A stand-in is longer than `LONG`: what may not be as long
    as that is refused by its own limit."""

    body: T
    _raw: Raw = b""
    _cut: dict[str, slice] = field(default_factory=dict)  # between the quotes
    _mark: bytes = b""  # what every stand-in begins with

    def text(self, found: str) -> Text:
        """What a string of the body really says. Raises BadRequest."""
        if (cut := self._cut.get(found)) is None:
            return found
        if cut.stop - cut.start <= TEXT:
            return from_json(self._raw[cut.start - 1 : cut.stop + 1], str)
        return tuple(from_json(b'"' + piece + b'"', str) for piece in _pieces(self._raw, cut))

    def written(self, found: str) -> memoryview | None:
        """A long string as JSON, quotes included, as it came and without a copy; None for other strings."""
        cut = self._cut.get(found)
        return None if cut is None else memoryview(self._raw)[cut.start - 1 : cut.stop + 1]

    def restored(self, document: bytes) -> list[bytes | bytearray | memoryview]:
        """The pieces of a document that was made of the body, its long strings again as they came."""
        pieces: list[bytes | bytearray | memoryview] = []
        done = 0
        while self._mark and (at := document.find(self._mark, done)) >= 0:
            cut = self._cut[document[at : at + LONG + 1].decode()]
            pieces += [document[done:at], memoryview(self._raw)[cut]]
            done = at + LONG + 1
        return [*pieces, document[done:]]


def outline(raw: Raw, kind: type[T], limits: OutlineLimits) -> Outline[T]:
    """The JSON in `raw` as `kind`. It must stay as it is as long as the outline is used. Raises BadRequest."""
    if len(raw) <= limits.max_bytes:
        return Outline(from_json(raw, kind))
    mark = secrets.token_hex(16)  # or a string of the body could be taken for another one
    rest, cut = _cut_out(raw, mark, limits)
    return Outline(from_json(rest, kind), raw, cut, mark.encode())


def _cut_out(raw: Raw, mark: str, limits: OutlineLimits) -> tuple[bytearray, dict[str, slice]]:
    kept = bytearray()
    cut: dict[str, slice] = {}
    strings = at = done = 0
    while (opens := raw.find(b'"', at, at + limits.max_bytes + 1)) >= 0:
        closes, escaped = _end_of_string(raw, opens + 1, limits.max_strings - strings)
        strings += 1 + escaped
        if closes - opens > LONG:
            name = f"{mark}{len(cut):x}".ljust(LONG + 1, ".")
            cut[name] = slice(opens + 1, closes)
            kept += raw[done : opens + 1] + name.encode()
            done = closes
        at = closes + 1
        if len(kept) + at - done > limits.max_bytes:
            break
    if len(kept) + len(raw) - done > limits.max_bytes:
        raise BadRequest(
            f"the body holds more than {limits.max_bytes} bytes beside its media (strings of more than {LONG} bytes)"
        )
    return kept + raw[done:], cut


def _end_of_string(raw: Raw, start: int, most: int) -> tuple[int, int]:
    """Where the quote is that ends a string, and how many quotes before it are escaped."""
    at = start
    for escaped in range(max(0, most)):
        while (quote := raw.find(b'"', at, at + PIECE)) < 0:
            at += PIECE
            if at >= len(raw):
                raise BadRequest("the body is not the JSON expected: a string has no end")
        before = raw[max(start, quote - BACKSLASHES) : quote]
        backslashes = len(before) - len(before.rstrip(b"\\"))
        if backslashes == BACKSLASHES:
            raise BadRequest("a string of the body holds too many backslashes")
        if backslashes % 2 == 0:
            return quote, escaped
        at = quote + 1
    raise BadRequest("the body holds too many strings")


def _pieces(raw: Raw, cut: slice) -> Iterator[bytes | bytearray]:
    """A string without its quotes, no escape torn apart. Raises BadRequest for escaped backslashes, which neither
    base64 nor a URL has: beside them, one cannot see where an escape begins."""
    at = cut.start
    while at < cut.stop:
        end = min(at + PIECE, cut.stop)
        if end < cut.stop:
            end = _between_characters(raw, end)
            if (escape := raw.rfind(b"\\", end - ESCAPE, end)) >= 0:
                end = escape
        piece = raw[at:end]
        if b"\\\\" in piece:
            raise BadRequest("media hold backslashes, which are neither base64 nor of a URL")
        yield piece
        at = end


def _between_characters(raw: Raw, end: int) -> int:
    """`end`, or up to three bytes before it, where a character of UTF-8 begins."""
    for back in range(4):
        if raw[end - back] & 0xC0 != 0x80:
            return end - back
    return end
