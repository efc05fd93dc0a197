"""Media made on the spot, the same each time: something to encode where no file is at hand.

The demo's image, video and audio, tiny media for the health probe, and images of noise. Only what needs a library
imports it: a process without Pillow and PyAV can still make the probe's media.
"""

from __future__ import annotations

import io
import math
import struct
import wave
import zlib

from encode_server.wire.modality import Modality

PICTURE_SIZE = (448, 336)
CLIP_SIZE = (224, 168)
CLIP_SECONDS = 2
CLIP_FPS = 12
SOUND_SECONDS = 1.5
SOUND_RATE = 16000

_PROBE_SIDE = 32
_PROBE_FRAMES = 4


def picture() -> bytes:
    """A PNG of 448x336 pixels: a red sun, a green hill and a white house before a blue gradient."""
    from PIL import Image, ImageDraw

    width, height = PICTURE_SIZE
    column = Image.new("RGB", (1, height))
    column.putdata([(40 + 150 * y // height, 110 + 110 * y // height, 235) for y in range(height)])
    image = column.resize(PICTURE_SIZE)
    draw = ImageDraw.Draw(image)
    draw.ellipse((320, 30, 400, 110), fill=(230, 60, 40))
    draw.ellipse((-120, 220, width + 120, 560), fill=(50, 140, 60))
    draw.rectangle((110, 160, 220, 260), fill=(245, 245, 240), outline=(40, 40, 40), width=3)
    draw.polygon([(95, 162), (165, 100), (235, 162)], fill=(150, 60, 40))
    draw.rectangle((150, 205, 180, 260), fill=(90, 60, 40))
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def clip() -> bytes:
    """An MP4 of 2 s, 12 frames/s, 224x168 pixels: a yellow ball that bounces from left to right.

    H.264, which browsers play, where the installed PyAV has it; else MPEG-4.
    """
    import av
    from PIL import Image, ImageDraw

    width, height = CLIP_SIZE
    frames = CLIP_SECONDS * CLIP_FPS
    out = io.BytesIO()
    with av.open(out, mode="w", format="mp4") as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=CLIP_FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # One thread: with several the bytes could differ from run to run.
        stream.codec_context.thread_count = 1
        for index in range(frames):
            x = 20 + (width - 40) * index / (frames - 1)
            y = height - 35 - 100 * abs(math.sin(math.pi * 2 * index / frames))
            image = Image.new("RGB", CLIP_SIZE, (30, 30, 80))
            draw = ImageDraw.Draw(image)
            draw.rectangle((0, height - 20, width, height), fill=(70, 110, 70))
            draw.ellipse((x - 15, y - 15, x + 15, y + 15), fill=(250, 210, 40))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return out.getvalue()


def sound() -> bytes:
    """A WAV of 1.5 s, 16 kHz, mono, 16 bits: a tone that rises from 200 Hz to 2 kHz, faded at both ends."""
    import numpy as np

    seconds = np.arange(int(SOUND_SECONDS * SOUND_RATE)) / SOUND_RATE
    phase = 2 * np.pi * (200 * seconds + (2000 - 200) * seconds**2 / (2 * SOUND_SECONDS))
    fade = np.minimum(1, np.minimum(seconds, SOUND_SECONDS - seconds) / 0.05)
    samples = (0.5 * fade * np.sin(phase) * 32767).astype("<i2")
    out = io.BytesIO()
    with wave.open(out, mode="wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SOUND_RATE)
        file.writeframes(samples.tobytes())
    return out.getvalue()


def noise(width: int, height: int, seed: int = 0) -> bytes:
    """A PNG of random RGB pixels: nothing about a pixel can be guessed from its neighbour."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def still_clip(width: int, height: int, seconds: int) -> bytes:
    """An MP4 of grey frames, 10 a second. `width` and `height` in pixels, even."""
    import av
    import numpy as np

    out = io.BytesIO()
    with av.open(out, mode="w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        frame = np.full((height, width, 3), 128, np.uint8)
        for _ in range(10 * seconds):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def silence(seconds: float) -> bytes:
    """A WAV of silence, 16 kHz, mono, 16 bits."""
    out = io.BytesIO()
    with wave.open(out, mode="wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SOUND_RATE)
        file.writeframes(bytes(2 * round(seconds * SOUND_RATE)))
    return out.getvalue()


def probe_media(modality: Modality) -> bytes:
    """Tiny media for a health probe and for warming up, made by the standard library alone.

    A PNG of 32 x 32 pixels, a silent WAV of 0.01 s (16 kHz, mono), or a GIF of four frames of 32 x 32 pixels, 10 frames
    per second.
    """
    return {Modality.IMAGE: _probe_image, Modality.AUDIO: _probe_audio, Modality.VIDEO: _probe_video}[modality]()


def _probe_image() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    side = _PROBE_SIDE
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)  # 8 bits a channel, RGB
    rows = b"".join(b"\0" + bytes([7 * y] * 3 * side) for y in range(side))  # no filter
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def _probe_audio() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SOUND_RATE)
        file.writeframes(bytes(2 * SOUND_RATE // 100))
    return out.getvalue()


def _probe_video() -> bytes:
    """Each frame is a ramp of 128 greys that begins further along than the last: equal frames could be merged."""
    side = _PROBE_SIDE
    greys = b"".join(bytes([2 * grey] * 3) for grey in range(128))
    frames = b""
    for number in range(_PROBE_FRAMES):
        pixels = bytes((4 * y + 32 * number) % 128 for y in range(side) for _ in range(side))
        # Codes of 8 bits, one for each pixel. The code 128 empties the dictionary before codes grow to 9 bits.
        codes = b"".join(b"\x80" + pixels[at : at + 64] for at in range(0, len(pixels), 64)) + b"\x81"
        blocks = b"".join(bytes([len(codes[at : at + 255])]) + codes[at : at + 255] for at in range(0, len(codes), 255))
        frames += struct.pack("<4sHBB", b"!\xf9\x04\0", 10, 0, 0)  # shown for 10 hundredths of a second
        frames += struct.pack("<cHHHHBB", b",", 0, 0, side, side, 0, 7) + blocks + b"\0"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0xF6, 0, 0) + greys + frames + b";"
