"""Image bytes to a picture."""

from __future__ import annotations

from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

from encode_server.errors import BadMedia, TooLarge
from encode_server.media.guard import decoding
from encode_server.media.limits import MediaLimits

# Raster formats decoded in this process. Left out: EPS (runs Ghostscript), WMF, PSD, and containers such as ICO whose
# inner pictures are larger than their header says.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "PCX", "SGI"),
    # Has no signature, so it comes last.
    "TGA",
)

# A progressive JPEG may rewrite the whole picture in each of thousands of scans; encoders make about ten.
_JPEG_SCANS = 16


def decode_image(data: bytes, limits: MediaLimits) -> Image.Image:
    """Decode the first picture of `data`, upright (EXIF orientation applied), as mode RGB.

    The result is what `transformers.image_utils.load_image` gives. Width and height are checked before any pixel is
    decoded. Pillow's own bound of 178 million pixels holds beside `limits.max_pixels`.

    Raises `BadMedia` for bytes that are no complete image of a format in `FORMATS`, `TooLarge` beyond a limit.
    """
    limits.check_bytes(len(data))
    with decoding("image"):
        return _decode(data, limits)


def _decode(data: bytes, limits: MediaLimits) -> Image.Image:
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise BadMedia(f"the image is in no format that is supported ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise TooLarge(f"the image has more than {limits.max_pixels} pixels") from error
    with image:
        width, height = image.size
        limits.check_pixels(width, height)
        _check_ratio(width * height * 3, len(data), limits)
        if image.format in ("JPEG", "MPO"):
            _check_scans(data, width * height, limits)
        return ImageOps.exif_transpose(image).convert("RGB")


def _check_ratio(decoded: int, compressed: int, limits: MediaLimits) -> None:
    if decoded > limits.ratio_floor_bytes and decoded > limits.max_ratio * compressed:
        raise TooLarge(
            f"the image would grow from {compressed} to {decoded} bytes, more than {limits.max_ratio:g} times"
        )


def _check_scans(data: bytes, pixels: int, limits: MediaLimits) -> None:
    if data.count(b"\xff\xda") * pixels > _JPEG_SCANS * limits.max_pixels:
        raise TooLarge("the image has too many scans for its size")
