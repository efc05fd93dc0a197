"""Small MP4 files that declare much are refused before FFmpeg makes room for what they declare."""

from __future__ import annotations

import io
import struct
import subprocess
import sys

import av
import numpy as np
import pytest

from encode_server.errors import BadMedia, TooLarge
from encode_server.media.audio import decode_audio
from encode_server.media.boxes import check_boxes
from encode_server.media.limits import MediaLimits
from encode_server.media.video import decode_video

from .boxes import box, flat_track, full, movie, mpeg4_entry, numbers, pcm_entry, pcm_movie, table, track
from .samples import container_sound_bytes, plain_frames, video_bytes

LIMITS = MediaLimits()
MANY = 85_000_000
BYTES = bytes(100)


def flat(samples: int, *more: bytes) -> bytes:
    return movie(flat_track(samples, *more), payload=BYTES)


def fragmented(samples: int, runs: int = 1) -> bytes:
    """Fragments whose samples take no bytes in their table, because each has the default duration and size."""
    run = box(b"trun", numbers(0, samples))
    fragment = box(b"traf", box(b"tfhd", numbers(0x20038, 1, 512, 1, 0)), *[run] * runs)
    defaults = box(b"mvex", full(b"trex", numbers(1, 1, 512, 1, 0)))
    return movie(flat_track(0), defaults) + box(b"moof", full(b"mfhd", numbers(1)), fragment)


def edited(edits: int, samples: int) -> bytes:
    """A track with an edit list in which every edit takes the whole track."""
    whole = flat_track(samples)
    rows = [struct.pack(">iiI", 48_000 * 60, 0, 65_536)] * edits
    return movie(box(b"trak", whole[8:], box(b"edts", full(b"elst", numbers(edits), *rows))), payload=bytes(samples))


def long_box(kind: bytes, content: bytes) -> bytes:
    return numbers(1) + kind + struct.pack(">Q", 16 + len(content)) + content


def items(kind: bytes, *content: bytes) -> bytes:
    handler = full(b"hdlr", bytes(4), b"pict", bytes(13))
    return movie(flat_track(10), full(b"meta", handler, box(kind, *content)), payload=BYTES)


def nested(samples: int, depth: int) -> bytes:
    inner = movie(flat_track(samples))[28:]
    for _ in range(depth):
        inner = box(b"moov", inner)
    return movie(inner, payload=BYTES)


ENTRY_INSIDE = mpeg4_entry(full(b"stsz", numbers(1, MANY)))
HOSTILE = {
    "constant sizes": flat(MANY),
    "four tracks": movie(*[flat_track(MANY // 4, number=1 + number) for number in range(4)], payload=BYTES),
    "PCM": movie(track(pcm_entry(1), full(b"stsz", numbers(2, 4 * 10**9)), table(b"stts", (4 * 10**9, 1)))),
    "sizes that are not there": flat(10, full(b"stsz", numbers(0, MANY))),
    "small sizes that are not there": flat(10, full(b"stz2", numbers(4, MANY))),
    "auxiliary sizes": flat(10, full(b"saiz", b"\x08", numbers(MANY))),
    "fragments": fragmented(MANY),
    "many runs": fragmented(500_000, 20),
    "edits": edited(1_000, 50_000),
    "tracks": movie(*[flat_track(1, number=number) for number in range(40)], payload=BYTES),
    "boxes": movie(bytes.fromhex("0000000866726565") * 600_000),
    "moov in moov": nested(MANY, 1),
    "deep": nested(MANY, 20),
    "moov called free": flat(MANY).replace(b"moov", b"free"),
    "64-bit sizes": movie(long_box(b"trak", flat_track(MANY)[8:]), payload=BYTES),
    "a box longer than the one around it": flat(MANY).replace(numbers(20) + b"stsz", numbers(1 << 31) + b"stsz"),
    "a box without a size": movie(numbers(0) + flat_track(MANY)[4:], payload=BYTES),
    "table in a description": movie(track(ENTRY_INSIDE, handler=b"vide"), payload=BYTES),
    "compressed header": box(b"ftyp", b"qt  ") + box(b"moov", box(b"cmov", BYTES)),
    "keys": movie(flat_track(1), full(b"meta", full(b"hdlr", bytes(21)), full(b"keys", numbers(MANY))), payload=BYTES),
    "items": items(b"iinf", numbers(1 << 24, MANY)),
    "places of items": items(b"iloc", numbers(2 << 24), b"\x44\x00", numbers(MANY)),
    **{
        kind: flat(10, full(kind.encode(), b"rap " if kind == "sbgp" else b"", numbers(MANY)))
        for kind in ("stts", "ctts", "stsc", "stco", "co64", "stss", "stps", "sbgp", "dref")
    },
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_declares_more_than_it_can_hold_is_refused(name: str) -> None:
    with pytest.raises((BadMedia, TooLarge)) as caught:
        check_boxes(HOSTILE[name], LIMITS)
    assert caught.value.message.startswith("the media")


def test_both_decoders_ask_before_they_open_a_file() -> None:
    """The most memory a process takes for it: FFmpeg would take 3 GB for this file of 700 bytes."""
    program = """
import re, sys
from pathlib import Path
from encode_server.errors import BadMedia
from encode_server.media.audio import decode_audio
from encode_server.media.limits import MediaLimits
from encode_server.media.video import decode_video

data = sys.stdin.buffer.read()
for decode, what in ((decode_video, lambda info: [0]), (decode_audio, 16_000)):
    try:
        decode(data, what, MediaLimits())
    except BadMedia as error:
        print(error.message)
print(re.search("VmHWM:[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1])
"""
    run = subprocess.run([sys.executable, "-c", program], input=flat(MANY), capture_output=True, check=True, timeout=60)
    *messages, kilobytes = run.stdout.decode().splitlines()
    assert messages == ["the media declares 85000000 bytes of samples and has 679 bytes"] * 2
    assert int(kilobytes) < 500_000


def made_by_ffmpeg(flags: str, *, format: str = "mp4") -> bytes:
    """A second of video beside audio, muxed with these flags."""
    out = io.BytesIO()
    with av.open(out, "w", format=format, options={"movflags": flags} if flags else {}) as container:
        video, audio = container.add_stream("libx264", rate=24), container.add_stream("aac", rate=48_000)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for number in range(24):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8))))
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.sample_rate = 48_000
            container.mux(audio.encode(frame))
        container.mux(video.encode())
        container.mux(audio.encode())
    return out.getvalue()


@pytest.mark.parametrize(
    "flags",
    ["", "frag_keyframe+empty_moov", "frag_every_frame+empty_moov", "dash+cmaf", "negative_cts_offsets"],
)
@pytest.mark.parametrize("format", ["mp4", "mov"])
def test_files_of_a_real_muxer_pass(flags: str, format: str) -> None:
    data = made_by_ffmpeg(flags, format=format)
    frames, info = decode_video(data, lambda info: range(info.total_num_frames), LIMITS)
    assert info.total_num_frames >= 23
    assert np.array_equal(frames, plain_frames(data))
    assert len(decode_audio(data, 16_000, LIMITS)) >= 5_000


def test_long_pcm_passes_though_it_declares_every_sample() -> None:
    seconds = 120
    data = pcm_movie(bytes(2 * 48_000 * seconds), 1)
    assert len(decode_audio(data, 48_000, LIMITS)) == 48_000 * seconds


def test_a_limit_on_length_bounds_what_may_be_declared() -> None:
    declared = movie(flat_track(3_000), payload=bytes(3_000))
    check_boxes(declared, LIMITS)
    with pytest.raises(TooLarge, match="3000 samples, more than 2000"):
        check_boxes(declared, MediaLimits(max_video_seconds=2, max_audio_seconds=1))


@pytest.mark.parametrize("kind", [b"iinf", b"iloc", b"trun", b"saiz", b"hdlr", b"stsd"])
def test_an_empty_box_at_the_end_passes(kind: bytes) -> None:
    check_boxes(box(b"free") + box(kind), LIMITS)


def test_other_formats_pass() -> None:
    for data in (b"", b"\0" * 7, b"RIFF", video_bytes("matroska"), video_bytes("avi", "mpeg4"), bytes(1000)):
        check_boxes(data, LIMITS)
    check_boxes(container_sound_bytes("adts", "aac"), LIMITS)
