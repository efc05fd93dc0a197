import base64
import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from encode_server.errors import BadMedia, TooLarge
from encode_server.media.image import FORMATS, SLOW_FORMATS, decode_image
from encode_server.media.limits import MediaLimits

from .samples import IMAGE_FORMATS, image_bytes, picture, png_header

LIMITS = MediaLimits(slow_formats=True)


def same_as_transformers(data: bytes) -> bool:
    expected = load_image(base64.b64encode(data).decode())
    image = decode_image(data, LIMITS)
    return image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("format", IMAGE_FORMATS)
def test_every_format_reads_as_transformers_reads_it(format: str) -> None:
    assert same_as_transformers(image_bytes(format))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA", "I;16", "CMYK"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = (
        Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)) if mode == "I;16" else picture().convert(mode)
    )
    assert same_as_transformers(image_bytes("TIFF" if mode == "CMYK" else "PNG", image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_bytes("JPEG", exif=exif)
    assert same_as_transformers(data)
    assert decode_image(data, LIMITS).size == ((40, 30) if orientation < 5 else (30, 40))


def test_progressive_jpeg_and_animations_read_their_picture() -> None:
    assert same_as_transformers(image_bytes("JPEG", progressive=True))
    frames = [picture(seed=n) for n in range(3)]
    for format in ("GIF", "WEBP", "PNG"):
        assert same_as_transformers(image_bytes(format, frames[0], save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize("format", [name for name in IMAGE_FORMATS if name != "JPEG2000"])
def test_a_file_cut_short_is_an_error(format: str) -> None:
    data = image_bytes(format, picture(200, 200))
    with pytest.raises(BadMedia):
        decode_image(data[: len(data) // 2], LIMITS)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    ],
)
def test_what_is_no_picture_is_an_error_that_names_the_formats(data: bytes) -> None:
    with pytest.raises(BadMedia, match="JPEG"):
        decode_image(data, LIMITS)


def test_postscript_never_reaches_an_interpreter() -> None:
    out = io.BytesIO()
    picture().save(out, "EPS")
    with pytest.raises(BadMedia):
        decode_image(out.getvalue(), LIMITS)


@pytest.mark.parametrize("size", [(30_000, 30_000), (9_000, 9_000), (2_000_000, 40)])
def test_a_bomb_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    start = time.thread_time()
    with pytest.raises(TooLarge):
        decode_image(png_header(*size, zlib.compress(bytes(1 << 20))), LIMITS)
    assert time.thread_time() - start < 2.0


def test_a_gif_whose_frame_is_larger_than_its_screen_counts_by_its_frame() -> None:
    data = bytearray(image_bytes("GIF", picture(8, 8)))
    at = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    data[at + 5 : at + 9] = struct.pack("<HH", 20_000, 20_000)
    with pytest.raises(TooLarge):
        decode_image(bytes(data), LIMITS)


def test_a_picture_that_grows_too_much_is_refused_but_small_flat_ones_are_not() -> None:
    flat = Image.new("RGB", (5_000, 5_000))
    with pytest.raises(TooLarge, match="times"):
        decode_image(image_bytes("PNG", flat), LIMITS)
    assert decode_image(image_bytes("PNG", flat.resize((2_000, 2_000))), LIMITS).size == (2_000, 2_000)


def test_a_jpeg_of_endless_scans_is_refused() -> None:
    data = image_bytes("JPEG", Image.new("RGB", (2_000, 1_000)), progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    start = time.thread_time()
    with pytest.raises(TooLarge, match="scans"):
        decode_image(data[:-2] + scan * 600 + b"\xff\xd9", LIMITS)
    assert time.thread_time() - start < 1


def qoi(width: int, height: int) -> bytes:
    return b"qoif" + struct.pack(">IIBB", width, height, 3, 0) + b"\xfeabc" * (width * height) + bytes(7) + b"\1"


def bmp_of_runs() -> bytes:
    """A BMP of 2 x 1 pixels in a palette, its only row one run."""
    pixels = b"\2\1" + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    start = 14 + len(head) + 1024
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + head + bytes(range(256)) * 4 + pixels


@pytest.mark.parametrize(
    "data",
    [
        *[image_bytes(format) for format in SLOW_FORMATS if format != "QOI"],
        *[qoi(2, 2), b"P3\n1 1\n255\n1 2 3\n", b"P6 1 1 100\n\1\2\3", bmp_of_runs()],
    ],
    ids=[*[format for format in SLOW_FORMATS if format != "QOI"], "QOI", "PPM as text", "PPM of 100", "BMP of runs"],
)
def test_slow_formats_want_an_option(data: bytes) -> None:
    with pytest.raises(BadMedia, match="--media-formats all"):
        decode_image(data, MediaLimits())
    assert same_as_transformers(data)


@pytest.mark.parametrize("format", FORMATS)
def test_common_formats_want_none(format: str) -> None:
    decode_image(image_bytes(format), MediaLimits())


def test_the_limits_are_the_caller_s() -> None:
    data = image_bytes("PNG")
    with pytest.raises(TooLarge, match="40 x 30"):
        decode_image(data, MediaLimits(max_pixels=40 * 30 - 1))
    with pytest.raises(TooLarge, match="bytes"):
        decode_image(data, MediaLimits(max_bytes=len(data) - 1))
    assert decode_image(data, MediaLimits(max_pixels=40 * 30, max_bytes=len(data))).size == (40, 30)
