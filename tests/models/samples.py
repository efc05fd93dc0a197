"""Generated media: noise, so that nothing about a pixel or a sample can be guessed from its neighbour."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import numpy.typing as npt
import soundfile
from PIL import Image

from encode_server.media.samples import noise

RATE = 16_000


def pixels(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(height: int, width: int, seed: int = 0) -> bytes:
    """A lossless picture of `pixels`."""
    return noise(width, height, seed)


def clip(frames: int, height: int, width: int, fps: int = 10, seed: int = 0) -> bytes:
    """A GIF of noise frames, no two alike."""
    pictures = [Image.fromarray(pixels(height, width, seed + 100 * number)) for number in range(frames)]
    out = BytesIO()
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], duration=1000 // fps)
    return out.getvalue()


def samples(seconds: float, seed: int = 0) -> npt.NDArray[np.float32]:
    """float32 noise within [-0.5, 0.5] at 16 kHz."""
    count = round(seconds * RATE)
    return np.random.default_rng(seed).uniform(-0.5, 0.5, count).astype(np.float32)


def wav(seconds: float, seed: int = 0) -> bytes:
    """`samples` in a float WAV, unchanged."""
    out = BytesIO()
    soundfile.write(out, samples(seconds, seed), RATE, format="WAV", subtype="FLOAT")
    return out.getvalue()
