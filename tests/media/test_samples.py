"""The generated media are what they say they are, and the same each time."""

from __future__ import annotations

import io
import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from encode_server.media import samples as demo_media
from encode_server.media.audio import decode_audio
from encode_server.media.image import decode_image
from encode_server.media.limits import MediaLimits
from encode_server.media.video import decode_video
from encode_server.wire.modality import Modality


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


def test_probe_media_decode() -> None:
    image = decode_image(demo_media.probe_media(Modality.IMAGE), MediaLimits())
    assert (image.size, image.getpixel((0, 0)), image.getpixel((31, 31))) == ((32, 32), (0, 0, 0), (217, 217, 217))
    frames, info = decode_video(demo_media.probe_media(Modality.VIDEO), lambda info: range(4), MediaLimits())
    assert (info.total_num_frames, frames.shape) == (4, (4, 32, 32, 3))
    assert info.fps == pytest.approx(10)
    for number, frame in enumerate(frames):
        expected = 2 * ((4 * np.arange(32)[:, None, None] + 32 * number) % 128)
        assert np.array_equal(frame, np.broadcast_to(expected, frame.shape))
    assert np.array_equal(decode_audio(demo_media.probe_media(Modality.AUDIO), 16_000, MediaLimits()), np.zeros(160))


def test_probe_media_need_no_decoder_s_library() -> None:
    program = """
import sys
from encode_server.media.samples import probe_media
from encode_server.wire.modality import Modality
for modality in Modality:
    probe_media(modality)
print({"PIL", "av", "numpy", "torch"} & set(sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True, timeout=60)
    assert run.stdout.strip() == "set()"


def test_noise_is_seeded() -> None:
    pixels = np.asarray(decode_image(demo_media.noise(40, 30, 1), MediaLimits()))
    assert pixels.shape == (30, 40, 3)
    assert demo_media.noise(40, 30, 1) == demo_media.noise(40, 30, 1) != demo_media.noise(40, 30, 2)
