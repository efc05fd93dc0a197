"""Media that are cheap to make unique: they hold a counter in a part that decoders skip.

A server that caches by content sees a new item each time, while its decoder does the same work. The counter lies on a
multiple of three bytes, so all but its own 24 bytes are base64-encoded once, not for every request.
"""

from __future__ import annotations

import base64
import io
import secrets
from dataclasses import dataclass, field
from itertools import count

from encode_server.media import samples
from encode_server.wire.modality import Modality

COUNTER_BYTES = 24


@dataclass
class UniqueMedia:
    """One medium, in endless copies whose bytes differ and whose content doesn't.

    `name` says what it is, `mime` its type. `head` and `tail` surround the counter; `head` is a multiple of 3 bytes.
    """

    name: str
    modality: Modality
    mime: str
    head: bytes
    tail: bytes
    # From anywhere: a second run must not send what the first sent, and a server may still know.
    _numbers: count[int] = field(default_factory=lambda: count(secrets.randbelow(10**15)))

    def __post_init__(self) -> None:
        assert len(self.head) % 3 == 0
        self._head64, self._tail64 = base64.b64encode(self.head), base64.b64encode(self.tail)

    def counter(self) -> bytes:
        """The next counter, as the bytes that go between head and tail."""
        return b"%0*d" % (COUNTER_BYTES, next(self._numbers))

    def copy(self) -> bytes:
        """The next copy, as a file."""
        return self.head + self.counter() + self.tail

    def data_uri(self) -> tuple[bytes, ...]:
        """The next copy as a data URI, in pieces."""
        return b"data:%s;base64," % self.mime.encode(), self._head64, base64.b64encode(self.counter()), self._tail64

    @property
    def nbytes(self) -> int:
        """Size of a copy."""
        return len(self.head) + COUNTER_BYTES + len(self.tail)


def jpeg(width: int, height: int, seed: int = 0) -> UniqueMedia:
    """A JPEG (quality 90, about 1.5 bits per pixel) of soft colours and some grain, as photographs have."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng([seed, width, height])
    coarse = random.integers(0, 256, (max(2, height // 32), max(2, width // 32), 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    pixels = np.clip(pixels + random.normal(0, 4, (height, width, 1)).astype(np.int16), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    data = out.getvalue()
    # A comment segment straight after the start of the image.
    head = data[:2] + b"\xff\xfe" + (2 + COUNTER_BYTES).to_bytes(2, "big")
    return UniqueMedia(f"image {width}x{height}", Modality.IMAGE, "image/jpeg", head, data[2:])


def mp4() -> UniqueMedia:
    """The demo's clip of two seconds, with a `free` box at its end."""
    data = samples.clip()
    padding = -(len(data) + 8) % 3
    size = 8 + padding + COUNTER_BYTES
    return UniqueMedia(
        "video clip", Modality.VIDEO, "video/mp4", data + size.to_bytes(4, "big") + b"free" + bytes(padding), b""
    )


def wav() -> UniqueMedia:
    """The demo's audio of one and a half seconds, with a chunk that decoders skip before its samples."""
    data = samples.sound()
    riff = (int.from_bytes(data[4:8], "little") + 8 + COUNTER_BYTES + 2).to_bytes(4, "little")
    chunk = b"JUNK" + (COUNTER_BYTES + 2).to_bytes(4, "little")
    return UniqueMedia(
        "sound", Modality.AUDIO, "audio/wav", b"RIFF" + riff + b"WAVE" + chunk + b"\0", b"\0" + data[12:]
    )
