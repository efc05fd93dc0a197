"""Tensor parallelism: each rank keeps its heads and its part of the MLP, and ranks add up where the two meet again.

A plan maps patterns of module names to what happens to them; modules no pattern matches are replicated. The scheme is
Megatron-LM's (arXiv:1909.08053): column-parallel into a block, row-parallel out of it, one all-reduce for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn

from encode_server.errors import StartupError


class Style(StrEnum):
    """What a rank keeps of a module.

    COLUMN: a part of a Linear's outputs. ROW: a part of its inputs, all-reduced, bias added once. FUSED_QKV: a part of
    each of q, k and v stacked in one Linear. HEADS: an attention module whose head count shrinks with its projections.
    """

    COLUMN = "column"
    ROW = "row"
    FUSED_QKV = "fused_qkv"
    HEADS = "heads"


Plan = Mapping[str, Style]
"""Regular expression of a whole module name → style."""

_HEAD_COUNTS = ("num_heads", "num_attention_heads", "all_head_size")


class RowParallelLinear(nn.Module):
    """A Linear over a part of the input features: partial products are summed over the ranks, then the bias added."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`weight`: [out, part of in]. `bias`: [out], the whole of it, on every rank."""
        super().__init__()
        self.partial = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.partial.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., part of in] → [..., out], the same on every rank."""
        output: torch.Tensor = self.partial(hidden)
        dist.all_reduce(output)
        return output if self.bias is None else output + self.bias


def shard(model: nn.Module, plan: Plan, *, rank: int, world: int) -> None:
    """Cut `model` down in place to what `rank` of `world` keeps. A world of one leaves it as it is.

    Raises:
        StartupError: a pattern matches nothing, or an attention module's heads cannot be divided by `world`.
    """
    if world == 1:
        return
    modules = dict(model.named_modules())
    for pattern, style in plan.items():
        names = [name for name in modules if re.fullmatch(pattern, name)]
        if not names:
            raise StartupError(f"tensor parallelism: no module of this model matches {pattern!r}")
        for name in names:
            _apply(model, name, modules[name], style, rank, world)


def split_range(size: int, rank: int, world: int) -> tuple[int, int]:
    """First and last + 1 of the part of `size` that `rank` keeps; parts differ by at most one."""
    bounds = [size * part // world for part in range(world + 1)]
    return list(pairwise(bounds))[rank]


def _apply(model: nn.Module, name: str, module: nn.Module, style: Style, rank: int, world: int) -> None:
    if style is Style.HEADS:
        _shrink_heads(name, module, world)
        return
    if not isinstance(module, nn.Linear):
        raise StartupError(f"tensor parallelism: {name} is not a Linear")
    weight = module.weight.data
    bias = None if module.bias is None else module.bias.data
    if style is Style.ROW:
        start, stop = split_range(weight.shape[1], rank, world)
        # clone: a view would keep the whole weight alive
        model.set_submodule(name, RowParallelLinear(weight[:, start:stop].clone(), bias))
        return
    parts = 3 if style is Style.FUSED_QKV else 1
    module.weight = nn.Parameter(_rows(weight, parts, rank, world), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(_rows(bias, parts, rank, world), requires_grad=False)
    module.out_features = module.weight.shape[0]


def _rows(tensor: torch.Tensor, parts: int, rank: int, world: int) -> torch.Tensor:
    """This rank's rows of each of `parts` equal parts stacked along dim 0, as a tensor of its own."""
    kept = []
    for part in tensor.chunk(parts):
        start, stop = split_range(part.shape[0], rank, world)
        kept.append(part[start:stop])
    return torch.cat(kept).clone() if parts > 1 else kept[0].clone()


def _shrink_heads(name: str, module: nn.Module, world: int) -> None:
    for attribute in _HEAD_COUNTS:
        count = getattr(module, attribute, None)
        if count is None:
            continue
        if count % world:
            raise StartupError(f"tp {world} does not divide {attribute} = {count} of {name}")
        setattr(module, attribute, count // world)
