"""Preprocessing on a GPU: which device a preparer takes, which processors can use it, and the way back to the host."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch

from encode_server.errors import StartupError
from encode_server.models.prepared import Prepared

LANCZOS = 1  # Pillow's number; on a GPU torchvision has bicubic interpolation in its place
LARGE = 64 << 20  # bytes, of a block that the allocator takes from its pool for large ones
KEPT_FREE = 256 << 20  # bytes of the device that a preparer keeps for the next item; the ranks need the rest
MOST_OFF = 0.05  # error against the CPU, root mean square, as a share of the largest value; rounding makes 0.005


def choose(device: str, process: int) -> str:
    """`cpu`, `cuda` or `cuda:N` → torch's name of the device for preparer number `process`.

    `cuda` spreads the preparers over the GPUs. Raises StartupError when this machine has no such GPU.
    """
    if device == "cpu":
        return device
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    _, _, number = device.partition(":")
    index = int(number) if number else process % max(1, found)
    if index >= found:
        have = "no GPU" if found == 0 else "1 GPU" if found == 1 else f"{found} GPUs"
        raise StartupError(f"--preproc-device {device}: torch finds {have}, counted from 0; cpu needs none")
    return f"cuda:{index}"


def unfit(processor: Any) -> str | None:
    """Why `processor` computes on the CPU alone; None when transformers lets it compute on another device."""
    if getattr(processor, "backend", None) != "torchvision":
        return f"{type(processor).__name__} takes no device"
    if (resample := getattr(processor, "resample", None)) is not None and int(resample) == LANCZOS:
        return f"{type(processor).__name__} resizes by Lanczos' method, which no GPU of torchvision's has"
    return None


def take_addresses(device: str) -> None:
    """Have torch's allocator reserve the addresses that it needs for large blocks, before the process' are limited.

    With expandable segments that is more than the GPU's whole memory. Later it would look like a GPU without memory,
    and every large item would take the CPU.
    """
    with contextlib.suppress(RuntimeError):  # what is wrong with the GPU shows in the trial that follows
        torch.empty(LARGE, dtype=torch.uint8, device=device)


def to_host(prepared: Prepared) -> Prepared:
    """`prepared` with its tensors on the CPU. What was queued for them on the device has ended when this returns."""
    return replace(prepared, tensors={name: tensor.cpu() for name, tensor in prepared.tensors.items()})


def trim(device: str) -> None:
    """Give the device back what a large item took."""
    if torch.cuda.memory_reserved(device) > KEPT_FREE:
        torch.cuda.empty_cache()


def difference(got: Prepared, want: Prepared) -> str | None:
    """How `got`, of a device, differs from `want`, of the CPU, beyond rounding; None where it does not."""
    shape = {name: (tensor.shape, tensor.dtype) for name, tensor in got.tensors.items()}
    if shape != {name: (tensor.shape, tensor.dtype) for name, tensor in want.tensors.items()}:
        return "it gives tensors of another shape there"
    for name, tensor in want.tensors.items():
        off = (got.tensors[name].double() - tensor.double()).square().mean().sqrt()
        if not off <= MOST_OFF * tensor.double().abs().max():
            return f"its {name} are others there"
    return None
