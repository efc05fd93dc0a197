"""MP4 and MOV files written box by box, for what no encoder would write."""

from __future__ import annotations

import struct


def box(kind: bytes, *content: bytes) -> bytes:
    """One box: 32-bit size, type, content."""
    body = b"".join(content)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def full(kind: bytes, *content: bytes) -> bytes:
    """A box that begins with a version and flags, all 0."""
    return box(kind, bytes(4), *content)


def numbers(*values: int) -> bytes:
    """Big-endian 32-bit numbers."""
    return struct.pack(f">{len(values)}I", *values)


def table(kind: bytes, *rows: tuple[int, ...]) -> bytes:
    """A box with a counted table of rows of 32-bit numbers."""
    return full(kind, numbers(len(rows)), *[numbers(*row) for row in rows])


def pcm_entry(channels: int, rate: int = 48_000, *boxes: bytes) -> bytes:
    """A sample description of 16-bit little-endian PCM, QuickTime's version 1, with `boxes` behind it."""
    head = struct.pack(">6xHHHI", 1, 1, 0, 0) + struct.pack(">HHHHI", channels, 16, 0, 0, rate << 16)
    return box(b"sowt", head, numbers(1, 2, 2 * channels, 2), *boxes)


def mpeg4_entry(*boxes: bytes) -> bytes:
    """A sample description of MPEG-4 video, 64 x 48."""
    inch = 72 << 16
    return box(b"mp4v", struct.pack(">6xH16xHHIIIH32xHh", 1, 64, 48, inch, inch, 0, 1, 24, -1), *boxes)


def layout(*labels: int) -> bytes:
    """A `chan` box that names every channel by its CoreAudio label."""
    return full(b"chan", numbers(0, 0, len(labels)), *[numbers(label, 0, 0, 0, 0) for label in labels])


def track(entry: bytes, *tables: bytes, handler: bytes = b"soun", number: int = 1) -> bytes:
    """A track with this one sample description and these sample tables."""
    head = full(b"tkhd", bytes(8), numbers(number), bytes(68))
    stbl = box(b"stbl", full(b"stsd", numbers(1), entry), *tables)
    dref = full(b"dref", numbers(1), box(b"url ", numbers(1)))  # the samples lie in this file
    minf = box(b"minf", full(b"smhd", bytes(4)), box(b"dinf", dref), stbl)
    mdia = box(b"mdia", full(b"mdhd", numbers(0, 0, 48_000, 0, 0)), full(b"hdlr", bytes(4), handler, bytes(13)), minf)
    return box(b"trak", head, mdia)


def movie(*boxes: bytes, payload: bytes = b"", brand: bytes = b"qt  ") -> bytes:
    """A file whose `moov` holds a movie header and these boxes; `payload` lies at byte 28, in front of it."""
    head = full(b"mvhd", numbers(0, 0, 48_000, 0), bytes(80))
    return box(b"ftyp", brand, numbers(0), brand) + box(b"mdat", payload) + box(b"moov", head, *boxes)


def pcm_movie(samples: bytes, channels: int, *boxes: bytes) -> bytes:
    """A MOV of 16-bit PCM `samples`, 48 kHz, one chunk; `boxes` go into its sample description."""
    count = len(samples) // (2 * channels)
    tables = (
        table(b"stts", (count, 1)),
        table(b"stsc", (1, count, 1)),
        full(b"stsz", numbers(2 * channels, count)),
        table(b"stco", (28,)),
    )
    return movie(track(pcm_entry(channels, 48_000, *boxes), *tables), payload=samples)


def flat_track(samples: int, *more: bytes, timing: bytes = b"", number: int = 1) -> bytes:
    """A video track of this many samples, all in one chunk and of one byte, which costs the file no byte for each."""
    tables = (
        timing or table(b"stts", (samples, 512)),
        table(b"stsc", (1, samples, 1)),
        full(b"stsz", numbers(1, samples)),
        table(b"stco", (28,)),
    )
    return track(mpeg4_entry(), *tables, *more, handler=b"vide", number=number)
