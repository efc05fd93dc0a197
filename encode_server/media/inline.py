"""Media that travel inside the request: data URIs and bare base64."""

from __future__ import annotations

import binascii
from collections.abc import Iterable, Iterator, Sequence

import pybase64

from encode_server.errors import BadMedia
from encode_server.media.limits import MediaLimits

# A conversion holds the interpreter lock until it returns. Between two pieces the event loop can run.
_PIECE = 1 << 20

_URL_ALPHABET = str.maketrans("-_", "+/")


def decode_inline(text: Sequence[str], limits: MediaLimits) -> bytes:
    """The bytes of a data URI (base64 or percent-encoded) or of bare base64. `text`: its pieces, in order; a data URI's
    type is in the first.

    Base64 may be in the standard or the URL alphabet, with or without padding, with line breaks and other space.

    Raises `BadMedia` for anything else, `TooLarge` beyond `limits.max_bytes`.
    """
    start = text[0][:_PIECE].lstrip()[: 5 + 1024] if text else ""
    if start[:5].lower() != "data:":
        return _join(_base64(_sliced(text, 0)), limits)
    comma = start.find(",", 5)
    if comma < 0:
        raise BadMedia("the data URI is malformed, expected data:<type>;base64,<data>")
    payload = _sliced(text, text[0].index(",", 5) + 1)
    if not start[5:comma].lower().rstrip().endswith(";base64"):
        return _join(_percent(payload), limits)
    if any("%" in piece for piece in text):
        payload = (piece.decode("latin-1") for piece in _percent(payload))
    return _join(_base64(payload), limits)


def _sliced(text: Sequence[str], start: int) -> Iterator[str]:
    """The text from `start` on, which is in its first piece, in pieces of at most `_PIECE` characters."""
    for piece in text:
        for at in range(start, len(piece), _PIECE):
            yield piece[at : at + _PIECE]
        start = 0


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


def _base64(text: Iterable[str]) -> Iterator[bytes]:
    carry = ""
    padded = False
    for some in text:
        piece = carry + some
        carry = ""
        if not padded and len(piece) % 4:
            whole = len(piece) // 4 * 4
            piece, carry = piece[:whole], piece[whole:]
        if not padded:
            try:
                yield pybase64.b64decode(piece, validate=True)
            except ValueError:
                pass  # line breaks or the URL alphabet, perhaps: see below
            else:
                padded = piece.endswith("=")
                continue
        piece = "".join((piece + carry).split())
        if padded and piece:
            raise BadMedia("the base64 goes on after its padding")
        whole = len(piece) // 4 * 4
        carry = piece[whole:]
        padded = padded or piece[:whole].endswith("=")
        yield _base64_piece(piece[:whole])
    carry = "".join(carry.split())
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


def _percent(text: Iterable[str]) -> Iterator[bytes]:
    carry = ""
    for some in text:
        piece = carry + some
        # An escape is three characters; don't cut one.
        cut = piece.rfind("%", max(0, len(piece) - 2))
        piece, carry = (piece[:cut], piece[cut:]) if cut >= 0 else (piece, "")
        yield _unquoted(piece)
    yield _unquoted(carry)


def _unquoted(text: str) -> bytes:
    # Quoted-printable has the same escapes with another sign, and a decoder in C, fifty times as fast as urllib's.
    try:
        return binascii.a2b_qp(text.encode().replace(b"=", b"=3D").replace(b"%", b"="))
    except UnicodeError as error:
        raise BadMedia("the data URI holds characters that belong to no text") from error
