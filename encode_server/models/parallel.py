"""Tensor parallelism: each rank keeps its heads and its part of the MLP, and ranks add up where the two meet again.

The scheme is Megatron-LM's (arXiv:1909.08053): column-parallel into a block, row-parallel out of it, one all-reduce for
each. What can be cut is found by `structure.find_blocks`; all else is replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from encode_server.models.structure import Block, find_blocks

Reduce = Callable[[torch.Tensor], object]
"""Replaces a tensor by its sum over the ranks, in place."""


class RowParallelLinear(nn.Module):
    """A Linear over a part of the input features: partial products are summed over the ranks, then the bias added."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, reduce: Reduce = dist.all_reduce) -> None:
        """`weight`: [out, part of in]. `bias`: [out], the whole of it, on every rank."""
        super().__init__()
        self.partial = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.partial.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._reduce = reduce

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., part of in] → [..., out], the same on every rank."""
        output: torch.Tensor = self.partial(hidden)
        self._reduce(output)
        return output if self.bias is None else output + self.bias


def shard(
    model: nn.Module, *, rank: int, world: int, whole: Collection[str] = (), reduce: Reduce = dist.all_reduce
) -> list[Block]:
    """Cut `model` down in place to what `rank` of `world` keeps, and say what was cut.

    Blocks whose heads `world` does not divide, and those of the classes `whole`, stay whole. A world of one leaves the
    model as it is.
    """
    if world == 1:
        return []
    blocks = [block for block in find_blocks(model) if block.divides(world) and block.kind not in whole]
    cut(model, blocks, rank=rank, world=world, reduce=reduce)
    return blocks


def cut(model: nn.Module, blocks: Iterable[Block], *, rank: int, world: int, reduce: Reduce = dist.all_reduce) -> None:
    """Cut `blocks` of `model` in place."""
    for block in blocks:
        for name, sizes in zip(block.into, block.parts, strict=True):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight = nn.Parameter(_rows(linear.weight.data, sizes, rank, world), requires_grad=False)
            if linear.bias is not None:
                linear.bias = nn.Parameter(_rows(linear.bias.data, sizes, rank, world), requires_grad=False)
            linear.out_features = linear.weight.shape[0]
        out = model.get_submodule(block.out)
        assert isinstance(out, nn.Linear)
        start, stop = split_range(out.in_features, rank, world)
        # clone: a view would keep the whole weight alive
        part = out.weight.data[:, start:stop].clone()
        bias = None if out.bias is None else out.bias.data
        model.set_submodule(block.out, RowParallelLinear(part, bias, reduce))
        owner = model.get_submodule(block.owner)
        for name in block.counts:
            setattr(owner, name, getattr(owner, name) // world)


def split_range(size: int, rank: int, world: int) -> tuple[int, int]:
    """First and last + 1 of the part of `size` that `rank` keeps; parts differ by at most one."""
    return size * rank // world, size * (rank + 1) // world


def _rows(tensor: torch.Tensor, sizes: Sequence[int], rank: int, world: int) -> torch.Tensor:
    """This rank's rows of each of the parts of these `sizes` stacked along dim 0, as a tensor of its own."""
    kept = []
    for part in torch.split(tensor, list(sizes)):
        start, stop = split_range(part.shape[0], rank, world)
        kept.append(part[start:stop])
    return torch.cat(kept).clone() if len(kept) > 1 else kept[0].clone()
