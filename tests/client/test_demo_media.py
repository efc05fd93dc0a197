"""The generated media are what they say they are, and the same each time."""

from __future__ import annotations

import io

import av
import numpy as np
import soundfile
from PIL import Image

from encode_server.media import samples as demo_media


def test_picture() -> None:
    image = Image.open(io.BytesIO(demo_media.picture()))
    assert (image.format, image.size, image.mode) == ("PNG", (448, 336), "RGB")
    assert image.getpixel((360, 70)) == (230, 60, 40)
    assert demo_media.picture() == demo_media.picture()


def test_clip() -> None:
    data = demo_media.clip()
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.duration == 2_000_000
    assert len(frames) == 24
    assert frames[0].shape == (168, 224, 3)
    assert np.abs(frames[0].astype(int) - frames[12].astype(int)).max() > 100  # It moves.
    assert demo_media.clip() == data


def test_sound() -> None:
    samples, rate = soundfile.read(io.BytesIO(demo_media.sound()))
    assert (rate, samples.shape) == (16000, (24000,))
    assert 0.45 < np.abs(samples).max() <= 0.5
    assert demo_media.sound() == demo_media.sound()
