"""What an MP4 or MOV file declares, checked before FFmpeg believes it.

While FFmpeg opens a file, FFmpeg builds an index with 24 to 40 bytes for each sample. The file itself may have no bytes
for each sample: 600 bytes can declare a hundred million samples of one size, and opening such a file takes gigabytes.
The walk below reads the boxes as FFmpeg reads them and refuses a file that declares more than it could
hold, or more than media within the limits would need.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from encode_server.errors import BadMedia, TooLarge
from encode_server.media.limits import MediaLimits

# The boxes that FFmpeg descends into.
_CONTAINERS = frozenset(
    (
        *(b"moov", b"trak", b"mdia", b"minf", b"stbl", b"dinf", b"edts", b"mvex", b"moof", b"traf", b"tref", b"udta"),
        *(b"sinf", b"schi", b"meta", b"ilst", b"wave", b"iprp"),
    )
)
# Tables whose entries lie in the box: where their count lies in the content, and the least bytes of an entry.
_COUNTED = {
    **{b"stsc": (4, 12), b"stco": (4, 4), b"co64": (4, 8), b"stss": (4, 4), b"stps": (4, 4), b"dref": (4, 12)},
    **{b"stts": (4, 8), b"ctts": (4, 8), b"elst": (4, 12), b"keys": (4, 8), b"sbgp": (8, 8)},
}
_TABLES = (*_COUNTED, b"stsz", b"stz2", b"trun", b"saiz", b"cmov")

# As deep as FFmpeg goes.
_DEPTH = 10
# Boxes in one file. A file in fragments of one frame has about eight for each frame.
_BOXES = 500_000
# Tracks in one file. Broadcasters send up to sixteen audio tracks beside the video.
_TRACKS = 32
# Samples a second of all tracks together: the shortest frames of audio take 2.5 ms.
_SAMPLES_PER_SECOND = 1000
# Index entries of all edits, as a multiple of the samples allowed: FFmpeg indexes the samples of each edit anew.
_EDITED = 4


@dataclass
class _Track:
    """What the boxes of one track declare: samples, their bytes, and the kinds of media named by its handlers."""

    samples: int = 0
    edits: int = 0
    handlers: set[bytes] = field(default_factory=set)
    timing: list[tuple[int, int]] = field(default_factory=list)

    @property
    def indexed(self) -> int:
        """Entries of FFmpeg's index. PCM, audio of one sample per time unit, has an entry for 1024 samples."""
        pcm = self.handlers == {b"soun"} and len(self.timing) == 1 and self.timing[0][1] == 1
        return self.samples // 1024 if pcm else self.samples


def check_boxes(data: bytes, limits: MediaLimits) -> None:
    """Check what the boxes of `data` declare. Bytes of any other format hold no boxes, and pass.

    Raises `TooLarge` for more samples, edits, tracks or boxes than media within `limits` need, `BadMedia` for tables
    that are larger than the file or that cannot be checked.
    """
    _Walk(data, limits).run()


class _Walk:
    def __init__(self, data: bytes, limits: MediaLimits) -> None:
        self._data = data
        self._most = int(_SAMPLES_PER_SECOND * max(limits.max_video_seconds, limits.max_audio_seconds))
        self._boxes = 0
        self._tracks = [_Track()]  # the first takes what lies outside of any track
        self._fragment_samples = 0

    def run(self) -> None:
        pending = [(0, len(self._data), 0)]
        while pending:
            start, end, depth = pending.pop()
            self._boxes_between(start, end, depth, pending)
        samples = self._fragment_samples + sum(track.indexed for track in self._tracks)
        if samples > self._most:
            raise TooLarge(f"the media declares {samples} samples, more than {self._most}")
        edited = sum(track.edits * track.indexed for track in self._tracks)
        if edited > _EDITED * self._most:
            raise TooLarge(f"the media's edit lists cover {edited} samples, more than {_EDITED * self._most}")

    def _boxes_between(self, start: int, end: int, depth: int, pending: list[tuple[int, int, int]]) -> None:
        """Check the boxes in a range of bytes. A container ends the range: both it and what follows become pending."""
        data = self._data
        while start + 8 <= end:
            self._boxes += 1
            if self._boxes > _BOXES:
                raise TooLarge(f"the media consists of more than {_BOXES} boxes")
            size, kind = struct.unpack_from(">I4s", data, start)
            body = start + 8
            if size == 1 and body + 8 <= end:
                size = struct.unpack_from(">Q", data, body)[0]
                body += 8
                if size < 16:
                    return
            elif size == 0:
                size = end - start
            elif size < 8:
                return
            # As FFmpeg does, cut a box that is longer than the box around it.
            stop = min(start + size, end)
            if kind in (b"free", b"hoov") and data[body + 4 : body + 8] in (b"mvhd", b"cmov"):
                kind = b"moov"
            if kind in _CONTAINERS:
                if depth == _DEPTH:
                    raise BadMedia(f"the media's boxes are nested deeper than {_DEPTH}")
                if kind == b"trak":
                    self._add_track()
                if kind == b"meta":
                    body = self._first_of_meta(body, stop)
                # Last in, first out: this box before the boxes behind it.
                pending.append((stop, end, depth))
                pending.append((body, stop, depth + 1))
                return
            self._check(kind, body, stop)
            start = stop

    def _first_of_meta(self, start: int, end: int) -> int:
        """Where the boxes of a `meta` box begin. Its version and flags are optional; FFmpeg looks for `hdlr`."""
        at = self._data.find(b"hdlr", start, end)
        while at >= 0 and (at - start) % 4:
            at = self._data.find(b"hdlr", at + 1, end)
        return at - 4 if at >= start + 4 else end

    def _add_track(self) -> None:
        if len(self._tracks) > _TRACKS:
            raise TooLarge(f"the media has more than {_TRACKS} tracks")
        self._tracks.append(_Track())

    def _check(self, kind: bytes, start: int, end: int) -> None:
        """Check the box of this kind whose content lies between `start` and `end`."""
        track = self._tracks[-1]
        version = self._data[start : min(start + 1, end)]  # nothing, in an empty box
        if kind in _COUNTED:
            count = self._count(kind, *_COUNTED[kind], start, end)
            if kind == b"elst":
                track.edits += count
            elif kind == b"stts":
                track.timing += [self._pair(start + 8 + 8 * row) for row in range(min(count, 2))]
        elif kind in (b"stsz", b"stz2"):
            self._sizes(kind, start, end, track)
        elif kind == b"trun":
            # With no flags set, an entry of a fragment takes no bytes.
            self._fragment_samples += self._number(start + 4, end)
        elif kind == b"saiz":
            track.samples = max(track.samples, self._number(start + 5, end))
        elif kind == b"hdlr":
            track.handlers |= {self._data[start + 8 : start + 12]} & {b"soun", b"vide"}
        elif (kind == b"iinf" and version > b"\0") or (kind == b"iloc" and version > b"\1"):
            # The items of a HEIF image. Earlier versions count with 16 bits.
            self._count(kind, 4 if kind == b"iinf" else 6, 6, start, end)
        elif kind == b"cmov":
            raise BadMedia("the media has a compressed header, expected a plain one")
        elif kind == b"stsd" and any(self._data.find(name, start, end) >= 0 for name in _TABLES):
            raise BadMedia("the media has a sample table inside a sample description")

    def _count(self, kind: bytes, at: int, each: int, start: int, end: int) -> int:
        """The number of entries of a table, its count `at` bytes into its content, at least `each` bytes an entry."""
        count = self._number(start + at, end)
        room = end - start - at - 4
        if count * each > room:
            raise BadMedia(f"the media's {kind.decode()} box declares {count} entries and has {max(room, 0)} bytes")
        return count

    def _sizes(self, kind: bytes, start: int, end: int, track: _Track) -> None:
        size, count = self._number(start + 4, end), self._number(start + 8, end)
        if kind == b"stsz" and size:
            if size * count > len(self._data):
                raise BadMedia(f"the media declares {size * count} bytes of samples and has {len(self._data)} bytes")
        else:
            bits = 32 if kind == b"stsz" else size & 0xFF
            if count * bits > 8 * (end - start - 12):
                raise BadMedia(f"the media's {kind.decode()} box declares {count} entries and has {end - start} bytes")
        track.samples += count

    def _number(self, at: int, end: int) -> int:
        """The 32-bit number at a position, 0 beyond `end`."""
        return int.from_bytes(self._data[at : at + 4], "big") if at + 4 <= end else 0

    def _pair(self, at: int) -> tuple[int, int]:
        count, duration = struct.unpack_from(">II", self._data, at)
        return count, duration
