"""Damaged files and odd strings: an error of ours or a result, never anything else."""

import asyncio
import random
import struct
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encode_server.errors import BadMedia, Forbidden, TooLarge
from encode_server.media.audio import decode_audio
from encode_server.media.image import decode_image
from encode_server.media.limits import MediaLimits
from encode_server.media.sources import MediaSource
from encode_server.media.video import decode_video

from .samples import (
    CONTAINER_KINDS,
    IMAGE_FORMATS,
    SOUND_KINDS,
    VIDEO_KINDS,
    container_sound_bytes,
    image_bytes,
    picture,
    sound_bytes,
    tone,
    video_bytes,
)

LIMITS = MediaLimits(
    max_pixels=1 << 20,
    max_frames=200,
    max_audio_seconds=60,
    max_decoded_bytes=1 << 26,
    decode_seconds=2,
    slow_formats=True,
)
# Chosen so that the whole file stays well below half a minute on a busy machine.
SECONDS_PER_SAMPLE = 0.25

DECODERS: dict[str, Callable[[bytes], object]] = {
    "image": lambda data: decode_image(data, LIMITS),
    "video": lambda data: decode_video(data, lambda info: range(0, info.total_num_frames, 3), LIMITS),
    "audio": lambda data: decode_audio(data, 16_000, LIMITS),
}
SAMPLES = [
    *[("image", image_bytes, (format, picture(64, 48))) for format in IMAGE_FORMATS],
    *[("video", video_bytes, (*kind, 8)) for kind in VIDEO_KINDS],
    *[("audio", sound_bytes, (*kind, tone(0.1))) for kind in SOUND_KINDS],
    *[("audio", container_sound_bytes, kind) for kind in CONTAINER_KINDS],
]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The bytes cut, flipped, overwritten with extremes, or with a piece doubled or left out."""
    out = bytearray(data)
    # Headers hold the interesting numbers.
    reach = len(out) if chance.random() < 0.5 else min(len(out), 200)
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randrange(reach)
        match chance.randrange(5):
            case 0:
                out[at] ^= 1 << chance.randrange(8)
            case 1:
                out[at : at + 4] = chance.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80"))
            case 2:
                out[at : at + 8] = chance.randbytes(8)
            case 3:
                del out[at : at + chance.randrange(1, 64)]
            case _:
                out[at:at] = out[at : at + chance.randrange(1, 64)]
        reach = max(1, min(reach, len(out)))
        if len(out) < reach:
            break
    if chance.random() < 0.3:
        del out[chance.randrange(len(out) + 1) :]
    return bytes(out)


def label(value: object) -> str:
    if isinstance(value, tuple):
        return "-".join(part for part in value if isinstance(part, str))
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("decoder", "make", "arguments"), SAMPLES, ids=label)
def test_damaged_files_end_in_a_result_or_in_an_error_of_ours(
    decoder: str, make: Callable[..., bytes], arguments: tuple[object, ...]
) -> None:
    data = make(*arguments)
    DECODERS[decoder](data)
    chance = random.Random(str(arguments[0]))
    end = time.monotonic() + SECONDS_PER_SAMPLE
    for _ in range(60):
        victim = damaged(data, chance)
        start = time.monotonic()
        try:
            DECODERS[decoder](victim)
        except (BadMedia, TooLarge) as error:
            assert " at 0x" not in error.message
        assert time.monotonic() - start < 20
        if time.monotonic() > end:
            break


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "TIFF", "GIF"])
def test_media_of_the_wrong_kind_are_no_crash(decoder: str, format: str) -> None:
    for data in (image_bytes(format), sound_bytes(), video_bytes(frames=2)):
        try:
            DECODERS[decoder](data)
        except (BadMedia, TooLarge):
            pass


def chunk(kind: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def split(data: bytes, mark: bytes) -> list[bytes]:
    at = data.index(mark)
    return [data[:at], data[at:]]


MANY = 300_000
IN_PIECES = {
    "texts of a PNG": lambda: image_bytes("PNG")[:33] + chunk(b"tEXt", b"a\0b") * MANY + image_bytes("PNG")[33:],
    "chunks behind the pixels of a PNG": lambda: image_bytes("PNG")[:-12] + chunk(b"abCd") * MANY + chunk(b"IEND"),
    "comments of a JPEG": lambda: b"\xff\xd8" + b"\xff\xfe\0\2" * MANY + image_bytes("JPEG")[2:],
    "padding of a JPEG": lambda: b"\xff\xd8" + b"\xff" * MANY + image_bytes("JPEG")[2:],
    "extensions of a GIF": lambda: b"\x21\xfe\0".join([b""] * MANY).join(split(image_bytes("GIF"), b"\x2c")),
    "a long comment of a PPM": lambda: b"P6\n#" + b"a" * MANY + b"\n1 1\n255\n\0\0\0",
}


@pytest.mark.parametrize("name", IN_PIECES)
def test_a_header_of_very_many_pieces_is_refused(name: str) -> None:
    """Pillow takes some 20 microseconds for each, and a file of 64 MB may have millions."""
    with pytest.raises(TooLarge, match="too many parts"):
        decode_image(IN_PIECES[name](), MediaLimits())


def test_a_header_that_takes_too_long_ends_in_time() -> None:
    with pytest.raises(TooLarge, match="takes longer than"):
        decode_image(IN_PIECES["comments of a JPEG"](), MediaLimits(slow_formats=True, decode_seconds=0.05))


SCHEMES = st.sampled_from(
    ["", "http://", "https://", "file://", "file:", "data:", "data:,", "data:;base64,", "/", "HTTP:", "ws://", "http:/"]
)


def test_any_string_is_bytes_or_an_error_of_ours() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async def fetch(url: str) -> None:
        try:
            assert await source.fetch(url)
        except (BadMedia, Forbidden):
            pass

    @settings(max_examples=500, deadline=None, database=None)
    @given(scheme=SCHEMES, rest=st.text(st.characters(), max_size=60))
    def check(scheme: str, rest: str) -> None:
        runner.run(fetch(scheme + rest))

    with ThreadPoolExecutor(1) as executor, asyncio.Runner() as runner:
        source = MediaSource([], [], MediaLimits(), executor, resolve=resolve)
        check()
        runner.run(source.aclose())
