"""Real media files, made on the spot, and how a plain full decode reads them."""

from __future__ import annotations

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import soundfile
from PIL import Image

IMAGE_FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA"]
VIDEO_KINDS = [
    ("mp4", "libx264"),
    ("mp4", "libx265"),
    ("webm", "libvpx"),
    ("webm", "libvpx-vp9"),
    ("matroska", "libx264"),
    ("avi", "mpeg4"),
    ("mpegts", "mpeg2video"),
    ("gif", "gif"),
]
SOUND_KINDS = [
    ("WAV", "PCM_16"),
    ("WAV", "FLOAT"),
    ("FLAC", "PCM_16"),
    ("OGG", "VORBIS"),
    ("OGG", "OPUS"),
    ("MP3", None),
]
CONTAINER_KINDS = [("mp4", "aac"), ("adts", "aac"), ("webm", "libopus"), ("ipod", "alac")]


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth shapes under noise, different for every seed."""
    noise = np.random.default_rng(seed).integers(0, 60, (height, width, 3), np.uint8)
    ramp = np.linspace(0, 190, width, dtype=np.uint8)[None, :, None]
    return Image.fromarray(noise + ramp)


def image_bytes(format: str, image: Image.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (image or picture()).save(out, format, **options)
    return out.getvalue()


def png_header(width: int, height: int, body: bytes = b"") -> bytes:
    """An RGB PNG of this size, whatever its compressed `body` holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def video_bytes(
    format: str = "mp4",
    codec: str = "libx264",
    frames: int = 24,
    size: tuple[int, int] = (64, 48),
    *,
    fps: int = 12,
    times: list[int] | None = None,
    options: dict[str, str] | None = None,
    images: list[Image.Image] | None = None,
) -> bytes:
    """A clip whose frames all differ. `times`: the frames' time stamps in milliseconds, for a variable rate.

    Keep to 64 x 48 and more: x265 writes outside its buffers for less.
    """
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if codec == "libx265":
            stream.options = {"x265-params": "log-level=none"}
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(frames):
            image = images[number] if images else picture(*size, seed=number)
            frame = av.VideoFrame.from_image(image)
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def plain_frames(data: bytes) -> np.ndarray:
    """Every frame of a full decode, uint8 RGB [n, H, W, 3]."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def tone(seconds: float = 0.5, rate: int = 44_100, channels: int = 2) -> np.ndarray:
    """Float32 [samples, channels]; every channel has its own pitch."""
    time = np.arange(int(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * 220 * (1 + n) * time) for n in range(channels)], 1).astype(np.float32)


def sound_bytes(format: str = "WAV", subtype: str | None = "PCM_16", samples: np.ndarray | None = None) -> bytes:
    out = io.BytesIO()
    rate = 48_000 if subtype == "OPUS" else 44_100
    soundfile.write(out, tone(rate=rate) if samples is None else samples, rate, format=format, subtype=subtype)
    return out.getvalue()


def container_sound_bytes(
    format: str, codec: str, rate: int = 48_000, *, layout: str = "stereo", samples: np.ndarray | None = None
) -> bytes:
    """`samples`, int16 [samples, channels] of this layout, or a stereo tone. Raises `av.error.FFmpegError` where the
    encoder or the container doesn't take the layout."""
    if samples is None:
        samples = np.round(tone(rate=rate) * 32_767).astype(np.int16)
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        # Packed: PyAV crashes on the planes of eight or more channels.
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout=layout)
        frame.sample_rate = rate
        for converted in av.AudioResampler(format=stream.format, layout=layout, rate=rate).resample(frame):
            container.mux(stream.encode(converted))
        container.mux(stream.encode())
    return out.getvalue()
