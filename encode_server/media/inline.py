"""Media that travel inside the request: data URIs and bare base64."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

import pybase64

from encode_server.errors import BadMedia
from encode_server.media.limits import MediaLimits

# A conversion holds the interpreter lock until it returns. Between two pieces the event loop can run.
_PIECE = 1 << 20

_URL_ALPHABET = str.maketrans("-_", "+/")


def decode_inline(text: str, limits: MediaLimits) -> bytes:
    """The bytes of a data URI (base64 or percent-encoded) or of bare base64.

    Base64 may be in the standard or the URL alphabet, with or without padding, with line breaks.

    Raises `BadMedia` for anything else, `TooLarge` beyond `limits.max_bytes`.
    """
    if text[:5].lower() != "data:":
        return _join(_base64(text), limits)
    comma = text.find(",", 5, 5 + 1024)
    if comma < 0:
        raise BadMedia("the data URI is malformed, expected data:<type>;base64,<data>")
    is_base64 = text[5:comma].lower().rstrip().endswith(";base64")
    if not is_base64:
        return _join(_percent(text, comma + 1), limits)
    payload = text[comma + 1 :]
    if "%" in payload:
        payload = _join(_percent(payload, 0), limits).decode("latin-1")
    return _join(_base64(payload), limits)


def _join(pieces: Iterator[bytes], limits: MediaLimits) -> bytes:
    parts: list[bytes] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        limits.check_bytes(size)
        parts.append(piece)
    if not size:
        raise BadMedia("the media is empty")
    return b"".join(parts)


def _base64(text: str) -> Iterator[bytes]:
    carry = ""
    padded = False
    for start in range(0, len(text), _PIECE):
        piece = text[start : start + _PIECE]
        if not carry and not padded:
            try:
                yield pybase64.b64decode(piece, validate=True)
            except ValueError:
                pass  # line breaks or the URL alphabet, perhaps: see below
            else:
                padded = piece.endswith("=")
                continue
        piece = carry + "".join(piece.split())
        if padded and piece:
            raise BadMedia("the base64 goes on after its padding")
        whole = len(piece) // 4 * 4
        carry = piece[whole:]
        padded = piece[:whole].endswith("=")
        yield _base64_piece(piece[:whole])
    if carry:
        # Strict mode refuses characters after the padding, also here.
        yield _base64_piece(("AAA=" if padded else "") + carry.ljust(4, "="))


def _base64_piece(piece: str) -> bytes:
    try:
        return pybase64.b64decode(
            piece.translate(_URL_ALPHABET) if "-" in piece or "_" in piece else piece, validate=True
        )
    except ValueError as error:
        raise BadMedia("the media is no URL that is supported and no valid base64") from error


def _percent(text: str, start: int) -> Iterator[bytes]:
    while start < len(text):
        end = start + _PIECE
        # An escape is three characters; don't cut one.
        cut = text.rfind("%", end - 2, end)
        end = cut if cut > start and end < len(text) else end
        try:
            yield unquote_to_bytes(text[start:end])
        except UnicodeError as error:
            raise BadMedia("the data URI holds characters that belong to no text") from error
        start = end
