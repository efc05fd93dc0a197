"""Image bytes to pixels."""

from __future__ import annotations

import math
from io import BytesIO

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from encode_server.errors import BadMedia, TooLarge
from encode_server.media.guard import decoding
from encode_server.media.limits import MediaLimits, Stopwatch

# Formats that are always decoded: at most 0.07 s for a million pixels (2 cores, Pillow 13). Left out of both lists: EPS
# (runs Ghostscript), WMF, PSD, and containers such as ICO whose inner images are larger than their header says.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "PPM")
# Formats that are rarely sent to a model, for `MediaLimits.slow_formats`. A megabyte of QOI takes a decoder in
# Python 0.8 s. JPEG 2000 takes 0.6 s for a million pixels and holds the interpreter lock all that time. PCX, SGI and
# TGA are fast but rare. TGA has no signature, so it comes last.
SLOW_FORMATS = ("JPEG2000", "QOI", "PCX", "SGI", "TGA")

# A progressive JPEG may rewrite the whole image in each of thousands of scans; encoders make about ten.
_JPEG_SCANS = 16

# Most bytes held for a pixel while it is decoded. RGB takes 4; a conversion or a rotation needs a second image, a
# progressive JPEG its coefficients. Measured: 4 to 10 for most, 20 for WebP, 12 for AVIF, 23 for JPEG 2000.
_OTHER_BYTES_PER_PIXEL = 12
_BYTES_PER_PIXEL = {"WEBP": 20, "AVIF": 16, "JPEG2000": 32}


class _File(BytesIO):
    """An image's bytes, for no more than `limits.image_reads` reads, and for no longer than a decode may take. Where
    slow formats are allowed the reads have no bound: a decoder in Python reads byte by byte."""

    def __init__(self, data: bytes, limits: MediaLimits) -> None:
        super().__init__(data)
        self._watch = Stopwatch(limits.decode_seconds)
        self._reads, self._most = 0, math.inf if limits.slow_formats else limits.image_reads

    def read(self, size: int | None = -1) -> bytes:
        """See BytesIO. Raises TooLarge."""
        self._reads += 1
        if self._reads > self._most:
            raise TooLarge(f"the image consists of too many parts: they take more than {self._most} reads")
        self._watch.check()
        return super().read(size)


def decode_image(data: bytes, limits: MediaLimits) -> Image.Image:
    """Decode the first image of `data`, upright (EXIF orientation applied), as mode RGB.

    The result is what `transformers.image_utils.load_image` gives, or, where the limits say `white_behind`, what vLLM
    gives: an image with transparency laid on white. docs/media.md says what that means for each kind of image. Width
    and height are checked before any pixel is decoded. Pillow's own bound of 178 million pixels holds beside
    `limits.max_pixels`.

    Raises `BadMedia` for bytes that are no complete image of a format in `FORMATS` (or `SLOW_FORMATS`, where the limits
    allow them), `TooLarge` beyond a limit.
    """
    limits.check_bytes(len(data))
    with decoding("image"):
        return _decode(data, limits)


def image_bytes(data: bytes, limits: MediaLimits) -> int:
    """The most bytes that `decode_image` holds beside `data`, from the image's header.

    Raises what `decode_image` raises for the same header.
    """
    limits.check_bytes(len(data))
    with decoding("image"), _open(data, limits) as image:
        return image.width * image.height * _BYTES_PER_PIXEL.get(image.format or "", _OTHER_BYTES_PER_PIXEL)


def _decode(data: bytes, limits: MediaLimits) -> Image.Image:
    with _open(data, limits) as image:
        # In place, and without a conversion from RGB to RGB: both would copy all pixels.
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "RGB":
            return image
        if limits.white_behind and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
            return _on_white(image)
        return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def _open(data: bytes, limits: MediaLimits) -> ImageFile.ImageFile:
    """The image, its header read and checked, its pixels not decoded yet."""
    formats = FORMATS + SLOW_FORMATS if limits.slow_formats else FORMATS
    try:
        image = Image.open(_File(data, limits), formats=formats)
    except UnidentifiedImageError as error:
        others = "" if limits.slow_formats else f"; with --media-formats all also {', '.join(SLOW_FORMATS)}"
        raise BadMedia(f"the image is in no format that is supported ({', '.join(formats)}{others})") from error
    except Image.DecompressionBombError as error:
        raise TooLarge(f"the image has more than {limits.max_pixels} pixels") from error
    width, height = image.size
    limits.check_pixels(width, height)
    _check_ratio(width * height * 3, len(data), limits)
    if not limits.slow_formats:
        _check_speed(image)
    if image.format in ("JPEG", "MPO"):
        _check_scans(data, width * height, limits)
    return image


def _check_speed(image: ImageFile.ImageFile) -> None:
    """Refuse the variants of fast formats that Pillow decodes in Python, such as PPM as text or BMP in run lengths."""
    if any(tile[0] in Image.DECODERS for tile in image.tile):
        raise BadMedia(
            f"the image is in a variant of {image.format} that is slow to decode; --media-formats all allows it"
        )


def _check_ratio(decoded: int, compressed: int, limits: MediaLimits) -> None:
    if decoded > limits.ratio_floor_bytes and decoded > limits.max_ratio * compressed:
        raise TooLarge(
            f"the image would grow from {compressed} to {decoded} bytes, more than {limits.max_ratio:g} times"
        )


def _check_scans(data: bytes, pixels: int, limits: MediaLimits) -> None:
    if data.count(b"\xff\xda") * pixels > _JPEG_SCANS * limits.max_pixels:
        raise TooLarge("the image has too many scans for its size")
