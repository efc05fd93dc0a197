"""Whether the embeddings are right on a device, before anything is timed: towers compared with fp32 on the CPU."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from benchmarks.floors import load_plain_model
from benchmarks.towers import Tower, write_checkpoint
from encode_server.media.limits import MediaLimits
from encode_server.media.unique import jpeg
from encode_server.models.encoder import DTYPES, load_encoder
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import open_directory
from encode_server.wire.modality import Modality

PICTURES = ((112, 112), (224, 168), (112, 112), (308, 252), (56, 420))
FLOAT32 = 1e-3
BFLOAT16 = 4e-2


@dataclass(frozen=True)
class Check:
    """`error`: the relative error found. `limit`: what it must not exceed."""

    name: str
    error: float
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """Also false when the error is not a number."""
        return self.error <= self.limit

    def document(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"ok": self.ok}


def checks(
    device: str, folder: Path, towers: Mapping[str, Tower], sizes: Sequence[tuple[int, int]] = PICTURES
) -> Iterator[Check]:
    """All checks of `towers` on a device, one by one, with pictures of `sizes`."""
    for name, tower in towers.items():
        path = write_checkpoint(tower, folder / name.replace(" ", "_"), dtype="float32", device="cpu")
        pictures = [jpeg(*size, seed=seed).copy() for seed, size in enumerate(sizes)]
        expected = plain(path, pictures, "cpu", "float32")
        preprocessor = Preprocessor(open_directory(path), MediaLimits())
        items = [dict(preprocessor.prepare(Modality.IMAGE, picture).tensors) for picture in pictures]

        with torch.backends.cudnn.flags(allow_tf32=False):  # on for convolutions, and not exact enough to compare with
            exact = ours(path, items, device, "float32")
        yield Check(f"{name}: fp32, a batch", relative_error(exact, expected), FLOAT32)
        # Other kernels than in fp32: segments of any length in one call.
        together = ours(path, items, device, "bfloat16")
        theirs = relative_error(plain(path, pictures, device, "bfloat16"), expected)
        note = f"transformers' own sdpa in bf16 is off by {theirs:.1e}"
        yield Check(f"{name}: bf16, a batch", relative_error(together, expected), max(BFLOAT16, 1.5 * theirs), note)
        alone = [ours(path, [item], device, "bfloat16")[0] for item in items]
        yield Check(f"{name}: bf16, alone as in the batch", relative_error(alone, together), BFLOAT16)
        yield from _parallel(name, path, items, expected, device, folder)


def _parallel(
    name: str, path: Path, items: list[dict[str, torch.Tensor]], expected: list[torch.Tensor], device: str, folder: Path
) -> Iterator[Check]:
    """Ranks that share the device over gloo; over NCCL one rank alone, and as many as there are devices."""
    runs = [("gloo", 2, f"{device}:0" if device == "cuda" else device)]
    if device == "cuda":
        runs.append(("nccl", 1, "cuda:0"))
        runs += [("nccl", world, "cuda") for world in (2, 4, 8) if torch.cuda.device_count() >= world]
    for backend, world, where in runs:
        try:
            embeddings, facts = run_ranks(path, items, where, "float32", backend, world)
            error, note = relative_error(embeddings, expected), f"joined in {facts['join_s']:.1f} s"
        except (RuntimeError, subprocess.TimeoutExpired) as failure:  # the others may work
            error, note = float("inf"), str(failure)
        yield Check(f"{name}: fp32, {world} rank(s) over {backend}", error, FLOAT32, note)


@torch.inference_mode()
def ours(path: Path, items: list[dict[str, torch.Tensor]], device: str, dtype: str) -> list[torch.Tensor]:
    """The items as one batch through our encoder, on the CPU in fp32."""
    encoder = load_encoder(str(path), device="cuda:0" if device == "cuda" else device, dtype=dtype)
    return [part.float().cpu() for part in encoder.forward(Modality.IMAGE, items)]


@torch.inference_mode()
def plain(path: Path, pictures: list[bytes], device: str, dtype: str) -> list[torch.Tensor]:
    """Each picture alone through transformers, DeepStack levels appended along dim."""
    model = load_plain_model(path, device, dtype)
    processor = transformers.AutoImageProcessor.from_pretrained(path)
    found = []
    for picture in pictures:
        inputs = processor(images=[Image.open(io.BytesIO(picture)).convert("RGB")], return_tensors="pt")
        output = model.get_image_features(
            inputs["pixel_values"].to(device, DTYPES[dtype]), inputs["image_grid_thw"].to(device)
        )
        levels = [output.pooler_output[0]]
        for level in getattr(output, "deepstack_features", None) or ():
            levels.append(level if isinstance(level, torch.Tensor) else level[0])
        found.append(torch.cat(levels, dim=-1).float().cpu())
    return found


def run_ranks(
    path: Path, items: list[dict[str, torch.Tensor]], device: str, dtype: str, backend: str, world: int
) -> tuple[list[torch.Tensor], dict[str, float]]:
    """The items through `world` ranks: the first one's embeddings and times. `cuda` means a device for each.

    Raises RuntimeError when a rank fails.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        inputs = {f"{index:03}/{key}": tensor for index, item in enumerate(items) for key, tensor in item.items()}
        save_file(inputs, folder / "inputs")
        processes = []
        for rank in range(world):
            options = {
                "model": path,
                "device": f"cuda:{rank}" if device == "cuda" else device,
                "dtype": dtype,
                "backend": backend,
                "rank": rank,
                "world": world,
                "folder": folder,
            }
            command = [sys.executable, "-m", "benchmarks.tp_worker", *(f"--{k}={v}" for k, v in options.items())]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.callback(process.kill)
            processes.append(process)
        told = [process.communicate(timeout=180) for process in processes]
        if any(process.returncode for process in processes):
            raise RuntimeError(f"a rank over {backend} failed: {' '.join(err.strip()[-500:] for _, err in told)}")
        outputs = load_file(folder / "outputs0")
        # The last line: libraries print before it.
        facts = dict(json.loads(told[0][0].strip().splitlines()[-1]))
        return [outputs[str(index)].float() for index in range(len(items))], facts


def relative_error(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm of what was expected, of all items; infinite for another shape."""
    if [part.shape for part in found] != [part.shape for part in expected]:
        return float("inf")
    # Over the whole array: `max` over items would overlook what is not a number.
    a, b = (torch.cat([part.flatten() for part in parts]) for parts in (found, expected))
    return float((a - b).norm() / b.norm())
