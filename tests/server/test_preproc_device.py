"""A whole server with `--preproc-device`: an emulated GPU in its preparers, and devices that do not exist."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encode_server.client import EncodeClient
from encode_server.media import samples
from tests.live import CPU, LiveServer

ROOT = Path(__file__).parents[2]
EMULATED = f"{Path(__file__).parent / 'emulated'}:{ROOT}"
MOST_OFF = 0.03  # of an embedding, relative, for noise; values of the input differ by up to one step of 255 in the mean


def _smooth(width: int, height: int) -> bytes:
    """An image without hard edges, whose values then differ by no more than one step."""
    rows, columns = np.mgrid[:height, :width]
    waves = (np.sin(columns / 37), np.cos(rows / 23), np.sin((rows + columns) / 51))
    file = io.BytesIO()
    Image.fromarray((127 + 90 * np.stack(waves, axis=-1)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def _encode(server: LiveServer, media: list[tuple[str, bytes]]) -> list[np.ndarray]:
    async def all_of_them() -> list[np.ndarray]:
        async with EncodeClient(server.base_url) as client:
            return [(await client.encode([data], modality)).numpy() for modality, data in media]

    return asyncio.run(all_of_them())


@pytest.mark.slow
def test_a_gpu_in_the_preparers_gives_nearly_what_the_cpu_gives(checkpoint, server, tmp_path):
    resized = [("image", _smooth(300, 200)), ("image", samples.noise(300, 200, 1)), ("video", samples.clip())]
    media = [*resized, ("audio", samples.sound())]
    options = ("--preproc-device", "cuda", "--preproc-processes", "1", "--cache-gb", "0")
    with LiveServer(checkpoint, tmp_path, *options, environment={"PYTHONPATH": EMULATED}) as on_gpu:
        got = _encode(on_gpu.healthy(), media)
        warnings = [line for line in on_gpu.lines if " WARNING " in line]
    want = _encode(server, media)
    off = [float(np.linalg.norm(one - other) / np.linalg.norm(other)) for one, other in zip(got, want, strict=True)]
    assert all(0 < one < MOST_OFF for one in off[:-1]), "0: the CPU has done it"
    assert off[0] < MOST_OFF / 3
    assert off[-1] == 0, "audio keeps the CPU"
    assert len(warnings) == 1 and "audio is preprocessed on the CPU" in warnings[0]


def _refused(checkpoint: Path, device: str) -> list[str]:
    """What a server that is to preprocess on `device` says before it ends, its log left out."""
    command = [sys.executable, "-m", "encode_server.cli", "serve", str(checkpoint), *CPU, "--preproc-device", device]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    return [line for line in ended.stderr.splitlines() if " INFO " not in line]


def test_a_device_of_another_name_is_refused_in_one_line(checkpoint):
    assert _refused(checkpoint, "gpu") == [
        "encode-server: --preproc-device: got 'gpu', takes cpu, cuda or cuda:N, e.g. cuda:0"
    ]


@pytest.mark.slow
def test_a_gpu_that_does_not_exist_ends_the_start_with_one_line(checkpoint):
    [line] = _refused(checkpoint, "cuda:99")
    assert line.startswith("encode-server: --preproc-device cuda:99: torch finds ")
    assert line.endswith(", counted from 0; cpu needs none")
