"""A picture, a clip and a sound made on the spot, the same each time: something to encode where no file is at hand."""

from __future__ import annotations

import io
import math
import wave

PICTURE_SIZE = (448, 336)
CLIP_SIZE = (224, 168)
CLIP_SECONDS = 2
CLIP_FPS = 12
SOUND_SECONDS = 1.5
SOUND_RATE = 16000


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
