"""What the emulated device was asked to do: launches with their bytes and operations, and waits of the host."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

_NOT_LAUNCHED = ("empty", "detach", "alias", "lift_fresh", "_has_compatible", "new_empty", "sym_", "record_stream")
_ROOTS = ("encode_server/", "transformers/")


class Kind(StrEnum):
    """KERNEL, copies to and from the device, COLLECTIVE."""

    KERNEL = "kernel"
    TO_DEVICE = "to device"
    TO_HOST = "to host"
    COLLECTIVE = "collective"


@dataclass(frozen=True)
class Attention:
    """What an attention kernel attends over: segment lengths in tokens, heads, width of a head in elements."""

    segments: tuple[int, ...]
    heads: int
    width: int


@dataclass(frozen=True)
class Launch:
    """One kernel or copy. `read`, `written`: bytes of device memory. `flops`: two for each multiplication of a matrix
    product. `place`: function that asked for it. `pinned`: the host's side of a copy is page-locked. `shape`: of its
    first output."""

    name: str
    kind: Kind
    place: str
    read: int = 0
    written: int = 0
    flops: int = 0
    attention: Attention | None = None
    pinned: bool = True
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Wait:
    """The host waited for the device. `place`: the function that made it wait."""

    why: str
    place: str


@dataclass
class Ledger:
    """In the order of asking."""

    launches: list[Launch] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)

    def clear(self) -> None:
        self.launches.clear()
        self.waits.clear()

    def of(self, kind: Kind) -> list[Launch]:
        return [launch for launch in self.launches if launch.kind is kind]


def launched(name: str) -> bool:
    """Whether the operator called `name` runs a kernel."""
    return not name.startswith(_NOT_LAUNCHED)


def place() -> str:
    """`file:function` of the innermost caller within encode_server or transformers."""
    for frame in reversed(traceback.extract_stack(limit=60)):
        for root in _ROOTS:
            if root in frame.filename:
                return f"{root}{frame.filename.rpartition(root)[2]}:{frame.name}"
    return f"{Path(traceback.extract_stack(limit=8)[0].filename).name}"


def unique_bytes(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of device memory behind `tensors`; what is broadcast counts as read once."""
    total = 0
    for tensor in tensors:
        count = 1
        for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
            count *= extent if stride else 1
        total += count * tensor.element_size()
    return total


def product_flops(name: str, args: Sequence[Any], out: torch.Tensor | None) -> int:
    """Of matrix products and convolutions; 0 for all else."""
    kind = name.partition(".")[0]
    if kind in ("addmm", "_addmm_activation"):
        return 2 * args[1].shape[0] * args[1].shape[1] * int(args[2].shape[1])
    if kind == "mm":
        return 2 * args[0].shape[0] * args[0].shape[1] * int(args[1].shape[1])
    if kind == "bmm":
        return 2 * args[0].shape[0] * args[0].shape[1] * args[0].shape[2] * int(args[1].shape[2])
    if kind == "baddbmm":
        return 2 * args[1].shape[0] * args[1].shape[1] * args[1].shape[2] * int(args[2].shape[2])
    if kind == "convolution" and out is not None:
        return 2 * out.numel() * int(args[1][0].numel())
    return 0
