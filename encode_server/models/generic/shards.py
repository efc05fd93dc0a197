"""Whether the shards of a model add up, found out in one process: each rank a thread, each sum a meeting of threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import nn

from encode_server.models.generic.compare import equal
from encode_server.models.parallel import cut
from encode_server.models.structure import Block, find_blocks

PATIENCE_S = 60.0
"""How long a rank waits for the others: a rank that fails breaks the barrier, so this only ends a hang."""

Encode = Callable[[nn.Module], Sequence[torch.Tensor]]
"""Runs a model over the probes: their rows."""


def whole_kinds(model: nn.Module, world: int, encode: Encode, want: Sequence[torch.Tensor]) -> list[str]:
    """Classes of modules that must stay whole with `world` ranks, because `encode` would give something else.

    `want`: what `encode` gives for `model`, which stays as it is.
    """
    blocks = [block for block in find_blocks(model) if block.divides(world)]
    if not blocks:
        return []
    if _adds_up(model, blocks, world, encode, want):
        return []
    kinds = sorted({block.kind for block in blocks})
    good = [
        kind
        for kind in kinds
        if _adds_up(model, [block for block in blocks if block.kind == kind], world, encode, want)
    ]
    together = [block for block in blocks if block.kind in good]
    if not _adds_up(model, together, world, encode, want):
        return kinds
    return [kind for kind in kinds if kind not in good]


def _adds_up(
    model: nn.Module, blocks: Sequence[Block], world: int, encode: Encode, want: Sequence[torch.Tensor]
) -> bool:
    """Whether `world` ranks that share `blocks` all compute `want`."""
    meeting = _Meeting(world)
    ranks = []
    for rank in range(world):
        part = copy.deepcopy(model)
        cut(part, blocks, rank=rank, world=world, reduce=meeting.reduce)
        ranks.append(part)
    with ThreadPoolExecutor(world) as pool:
        results = [pool.submit(meeting.attend, rank, partial(encode, part)) for rank, part in enumerate(ranks)]
    try:
        return all(equal(result.result(), want) for result in results)
    except Exception:
        return False  # Whatever a shard cannot do.


class _Meeting:
    """Where the threads of all ranks wait for each other to add up."""

    def __init__(self, world: int) -> None:
        self._barrier = threading.Barrier(world)
        self._parts: list[torch.Tensor | None] = [None] * world
        self._rank = threading.local()

    def attend(self, rank: int, work: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
        self._rank.number = rank
        try:
            with torch.inference_mode():
                return work()
        except BaseException:
            self._barrier.abort()
            raise

    def reduce(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by the sum over the ranks. All ranks must come with tensors of one shape."""
        self._parts[self._rank.number] = tensor.clone()
        self._barrier.wait(PATIENCE_S)
        parts = [part for part in self._parts if part is not None]
        if any(part.shape != tensor.shape for part in parts):
            raise ValueError("ranks add up tensors of different shapes")
        torch.sum(torch.stack(parts), dim=0, out=tensor)
        self._barrier.wait(PATIENCE_S)
