"""What vLLM's own class of a family computes for media, and what our server answers: the same rows in one order."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from encode_server.client import EncodeClient
from tests.interop.released import write_released
from tests.interop.vllm_cpu import has_avx512, vllm_python
from tests.live import LiveServer
from tests.models import samples
from tests.models.reference import frames_of

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(not has_avx512(), reason="vLLM's CPU kernels need AVX-512"),
]

HERE = Path(__file__).parent
TOLERANCE = 1e-4
"""Of values up to 1, and relative to the largest value above."""

IMAGE, VIDEO, AUDIO = "image", "video", "audio"
FAMILIES = {
    **dict.fromkeys(("cohere2_vision", "gemma3", "idefics3", "lfm2_vl", "llama4", "llava", "llava_next"), (IMAGE,)),
    **dict.fromkeys(("llava_pixtral", "mistral3", "paddleocr_vl", "paligemma", "smolvlm", "minicpmv4_6"), (IMAGE,)),
    **dict.fromkeys(("glm4v", "glm4v_moe", "internvl", "llava_onevision"), (IMAGE, VIDEO)),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), (IMAGE, VIDEO)),
    **dict.fromkeys(("gemma4", "qwen2_5_omni_thinker"), (AUDIO, IMAGE, VIDEO)),
    "qwen3_asr": (AUDIO,),
}
"""What is compared of each family. docs/vllm.md says why nothing more is."""

FRAMES = {"llava_onevision": [(4, 130, 90)]}
"""Clips of a family whose processor here takes fewer frames of others than vLLM does."""


def media(family: str) -> dict[str, bytes]:
    """Files by name: images and clips of several shapes, audio of several lengths."""
    made = {f"{IMAGE}-{n}": samples.png(*size, seed=n) for n, size in enumerate([(300, 420), (64, 64), (97, 233)])}
    clips = FRAMES.get(family, [(4, 90, 150), (4, 130, 90)])
    made |= {f"{VIDEO}-{n}": samples.clip(*clip, fps=2, seed=n) for n, clip in enumerate(clips)}
    made |= {f"{AUDIO}-{n}": samples.wav(seconds, n) for n, seconds in enumerate([1.93, 0.61, 3.3])}
    return {name: data for name, data in made.items() if name.partition("-")[0] in FAMILIES[family]}


def decoded(name: str, data: bytes) -> np.ndarray:
    kind, _, number = name.partition("-")
    if kind == IMAGE:
        return samples.pixels(*[(300, 420), (64, 64), (97, 233)][int(number)], int(number))
    return frames_of(data)[0] if kind == VIDEO else samples.samples([1.93, 0.61, 3.3][int(number)], int(number))


def theirs(checkpoint: Path, files: dict[str, bytes], tmp: Path) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """Rows of each item, and how many vLLM's prompt has room for."""
    folder, out = tmp / "media", tmp / "rows.safetensors"
    folder.mkdir()
    for name, data in files.items():
        np.save(folder / f"{name}.npy", decoded(name, data))
    done = subprocess.run(
        [vllm_python(), HERE / "vllm_rows.py", checkpoint, folder, out],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return load_file(out), json.loads(done.stdout.splitlines()[-1])


async def ours(url: str, files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    async with EncodeClient(url) as client:
        found = await asyncio.gather(*(client.encode([data], name.partition("-")[0]) for name, data in files.items()))
    return {name: one.torch() for name, one in zip(files, found, strict=True)}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_its_rows_are_ours(family: str, tmp_path: Path) -> None:
    checkpoint = write_released(family, tmp_path / "checkpoint")
    files = media(family)
    want, room = theirs(checkpoint, files, tmp_path)
    with LiveServer(checkpoint, tmp_path / "run") as live:
        got = asyncio.run(ours(live.healthy(300).base_url, files))
    for name, rows in got.items():
        # Of a single video, LLaVA-OneVision's class gives [1, tokens, dim].
        expected = want[name].reshape(-1, want[name].shape[-1])
        assert rows.shape == expected.shape and len(rows) == room[name], name
        difference, largest = float((rows - expected).abs().max()), float(expected.abs().max())
        print(
            f"{family} {name}: {tuple(rows.shape)}, largest difference {difference:.1e} of values up to {largest:.1f}"
        )
        assert difference <= TOLERANCE * max(1.0, largest), name
