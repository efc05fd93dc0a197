"""Every row of docs/media.md: what is made of an image of each kind, and what SGLang and vLLM make of it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from encode_server.media.image import decode_image
from encode_server.media.limits import MediaLimits

Pixels = npt.NDArray[Any]

RANDOM = np.random.default_rng(0)
RGB = RANDOM.integers(0, 256, (6, 9, 3), dtype=np.uint8)
ALPHA = RANDOM.integers(0, 256, (6, 9), dtype=np.uint8)
GREY = RANDOM.integers(0, 256, (6, 9), dtype=np.uint8)
DEEP = RANDOM.integers(0, 65536, (6, 9, 4)).astype(np.uint16)
WIDE = DEEP[:, :, 0]
PALETTE = RANDOM.integers(0, 256, (16, 3), dtype=np.uint8)
PLACES = RANDOM.integers(0, 16, (6, 9), dtype=np.uint8)
CLEAR = 3
ALPHAS = np.arange(0, 256, 16, dtype=np.uint8)


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _palette() -> Image.Image:
    image = Image.fromarray(PLACES, "P")
    image.putpalette(PALETTE.tobytes())
    return image


def _rotated(kind: str, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return _saved(Image.fromarray(RGB), kind, exif=exif, **options)


def _animated(kind: str, **options: Any) -> bytes:
    return _saved(
        Image.fromarray(RGB), kind, save_all=True, append_images=[Image.fromarray(RGB[::-1].copy())], **options
    )


def _png16(values: Pixels, colour: int) -> bytes:
    """A PNG of 16 bits a channel, which Pillow reads and does not write. `colour`: PNG's type."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _grey(values: Pixels) -> Pixels:
    return np.repeat(values.astype(np.uint8)[:, :, None], 3, axis=2)


def _on_white(colours: Pixels, alpha: Pixels) -> Pixels:
    share = alpha[:, :, None].astype(float) / 255
    return np.round(colours * share + 255 * (1 - share))


def _cmyk(values: Pixels) -> Pixels:
    inverse = 255 - values.astype(float)
    return inverse[:, :, :3] * inverse[:, :, 3:] / 255


RGBA = np.dstack([RGB, ALPHA])
HIGH = (DEEP >> 8).astype(np.uint8)
LOOKED_UP = PALETTE[PLACES]
UPRIGHT = np.rot90(RGB, -1)
FLOATS = (GREY.astype(np.float32), (GREY / 256).astype(np.float32))
WHITE = np.full_like(RGB, 255)
BLACK = np.zeros_like(RGB)
CMYK = np.dstack([RGB, ALPHA])
BITS = np.where(GREY > 127, 255, 0)
WIDE_CUT = _grey(np.minimum(WIDE, 255))

# Kind → the file, the pixels here and in SGLang, the pixels in vLLM and with --image-alpha white; None: the same.
KINDS: dict[str, tuple[Callable[[], bytes], Pixels, Pixels | None]] = {
    "rgb": (lambda: _saved(Image.fromarray(RGB), "PNG"), RGB, None),
    "16-bit rgb": (lambda: _png16(DEEP[:, :, :3], 2), HIGH[:, :, :3], None),
    "rgba png": (lambda: _saved(Image.fromarray(RGBA), "PNG"), RGB, _on_white(RGB, ALPHA)),
    "rgba webp": (
        lambda: _saved(Image.fromarray(RGBA), "WEBP", lossless=True, exact=True),
        RGB,
        _on_white(RGB, ALPHA),
    ),
    "rgba tiff": (lambda: _saved(Image.fromarray(RGBA), "TIFF"), RGB, _on_white(RGB, ALPHA)),
    "16-bit rgba": (lambda: _png16(DEEP, 6), HIGH[:, :, :3], _on_white(HIGH[:, :, :3], HIGH[:, :, 3])),
    "grey with alpha": (
        lambda: _saved(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)]), "PNG"),
        _grey(GREY),
        _on_white(_grey(GREY), ALPHA),
    ),
    "16-bit grey with alpha": (
        lambda: _png16(DEEP[:, :, :2], 4),
        _grey(HIGH[:, :, 0]),
        _on_white(_grey(HIGH[:, :, 0]), HIGH[:, :, 1]),
    ),
    "palette": (lambda: _saved(_palette(), "PNG"), LOOKED_UP, None),
    "gif": (lambda: _saved(_palette(), "GIF"), LOOKED_UP, None),
    "palette with a transparent colour": (
        lambda: _saved(_palette(), "PNG", transparency=CLEAR),
        LOOKED_UP,
        np.where((PLACES == CLEAR)[:, :, None], 255, LOOKED_UP),
    ),
    "palette with alphas": (
        lambda: _saved(_palette(), "PNG", transparency=ALPHAS.tobytes()),
        LOOKED_UP,
        _on_white(LOOKED_UP, ALPHAS[PLACES]),
    ),
    "gif with a transparent colour": (
        lambda: _saved(_palette(), "GIF", transparency=CLEAR),
        LOOKED_UP,
        np.where((PLACES == CLEAR)[:, :, None], 255, LOOKED_UP),
    ),
    "grey with a transparent value": (
        lambda: _saved(Image.fromarray(GREY), "PNG", transparency=int(GREY[0, 0])),
        _grey(GREY),
        np.where((GREY[0, 0] == GREY)[:, :, None], 255, _grey(GREY)),
    ),
    "rgb with a transparent colour": (
        lambda: _saved(Image.fromarray(RGB), "PNG", transparency=tuple(int(value) for value in RGB[0, 0])),
        RGB,
        None,
    ),
    "1 bit": (lambda: _saved(Image.fromarray(GREY > 127), "PNG"), _grey(BITS), None),
    "grey": (lambda: _saved(Image.fromarray(GREY), "PNG"), _grey(GREY), None),
    "16-bit grey png": (lambda: _saved(Image.fromarray(WIDE), "PNG"), WIDE_CUT, None),
    "16-bit grey tiff": (lambda: _saved(Image.fromarray(WIDE), "TIFF"), WIDE_CUT, None),
    "16-bit grey tiff, other byte order": (
        lambda: _saved(Image.frombytes("I;16B", (9, 6), WIDE.astype(">u2").tobytes()), "TIFF"),
        WIDE_CUT,
        None,
    ),
    "32-bit integers": (lambda: _saved(Image.fromarray(WIDE.astype(np.int32)), "TIFF"), WIDE_CUT, None),
    "floating point": (lambda: _saved(Image.fromarray(FLOATS[0]), "TIFF"), _grey(GREY), None),
    "floating point below 1": (lambda: _saved(Image.fromarray(FLOATS[1]), "TIFF"), BLACK, None),
    "cmyk jpeg": (
        lambda: _saved(Image.new("CMYK", (9, 6), (10, 200, 30, 40)), "JPEG", quality=100),
        _cmyk(np.full((6, 9, 4), (10, 200, 30, 40), np.uint8)),
        None,
    ),
    "cmyk tiff": (lambda: _saved(Image.frombytes("CMYK", (9, 6), CMYK.tobytes()), "TIFF"), _cmyk(CMYK), None),
    "ycbcr tiff": (lambda: _saved(Image.fromarray(RGB).convert("YCbCr"), "TIFF"), RGB, None),
    "rotated jpeg": (lambda: _rotated("JPEG", quality=100, subsampling=0), UPRIGHT, None),
    "rotated png": (lambda: _rotated("PNG"), UPRIGHT, None),
    "rotated webp": (lambda: _rotated("WEBP", lossless=True), UPRIGHT, None),
    "rotated tiff": (lambda: _rotated("TIFF"), UPRIGHT, None),
    "animated gif": (
        lambda: _saved(_palette(), "GIF", save_all=True, append_images=[_palette().transpose(Image.Transpose(0))]),
        LOOKED_UP,
        None,
    ),
    "animated png": (lambda: _animated("PNG"), RGB, None),
    "animated webp": (lambda: _animated("WEBP", lossless=True), RGB, None),
}
ROUNDED = {"cmyk jpeg": 3, "cmyk tiff": 1, "ycbcr tiff": 4, "rotated jpeg": 5}
"""Largest difference where a format or a conversion rounds. Blending with white rounds by 1."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("white", [False, True], ids=["drop", "white"])
def test_an_image_of_each_kind(kind: str, white: bool) -> None:
    make, dropped, on_white = KINDS[kind]
    want = on_white if white and on_white is not None else dropped
    image = decode_image(make(), MediaLimits(white_behind=white))
    assert image.mode == "RGB"
    got = np.asarray(image).astype(float)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= ROUNDED.get(kind, int(white))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_transformers_gives_its_processors(kind: str, tmp_path: Any) -> None:
    from transformers.image_utils import load_image

    data = KINDS[kind][0]()
    (tmp_path / "image").write_bytes(data)
    want = load_image(str(tmp_path / "image"))
    assert np.array_equal(np.asarray(decode_image(data, MediaLimits())), np.asarray(want))


def test_lab_is_converted() -> None:
    """Its conversion is littleCMS's, so that only the colour of grey is known here."""
    grey = Image.frombytes("LAB", (9, 6), bytes((128, 0, 0)) * 54)
    values = np.asarray(decode_image(_saved(grey, "TIFF"), MediaLimits())).astype(int)
    assert np.ptp(values, axis=2).max() <= 2 and 100 < values.mean() < 140
