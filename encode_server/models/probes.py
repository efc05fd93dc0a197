"""Tiny valid media, generated in memory, for the health probe and for warming up."""

from __future__ import annotations

import wave
from io import BytesIO

from PIL import Image

from encode_server.wire.modality import Modality

_SIDE = 32
_FRAMES = 4
_RATE = 16_000


def probe_media(modality: Modality) -> bytes:
    """A 32×32 PNG, a 0.01 s silent WAV (16 kHz, mono), or a GIF clip of four 32×32 frames at 10 per second."""
    return {Modality.IMAGE: _png, Modality.AUDIO: _wav, Modality.VIDEO: _clip}[modality]()


def _png() -> bytes:
    out = BytesIO()
    Image.linear_gradient("L").resize((_SIDE, _SIDE)).convert("RGB").save(out, "PNG")
    return out.getvalue()


def _wav() -> bytes:
    out = BytesIO()
    with wave.open(out, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(_RATE)
        sound.writeframes(bytes(2 * _RATE // 100))
    return out.getvalue()


def _clip() -> bytes:
    ramp = Image.linear_gradient("L").resize((_SIDE, _SIDE))
    frames = [ramp.rotate(90 * turn) for turn in range(_FRAMES)]  # equal frames would be merged into one
    out = BytesIO()
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=100, loop=0)
    return out.getvalue()
