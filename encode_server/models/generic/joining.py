"""How the tensors of several items become those of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from encode_server.wire.checkpoint import Batching, ModalityFacts

Item = Mapping[str, torch.Tensor]
"""One item's CPU tensors; never written to."""

TOKENS = "tokens"
"""Name of the scalar that says how many rows an item has; no processor uses the name."""

_POOLING = "_pooling"
"""What names of tensors end in whose values are positions among the patches of the same call; -1 for none."""


def groups(items: Sequence[Item], facts: ModalityFacts) -> list[list[int]]:
    """Indices of items that go into one call together."""
    if facts.batching is Batching.ALONE:
        return [[index] for index in range(len(items))]
    alike: dict[Any, list[int]] = {}
    for index, item in enumerate(items):
        alike.setdefault(tuple(sorted(_alike(item, facts).items())), []).append(index)
    return list(alike.values())


def unlike(items: Sequence[Item]) -> list[str]:
    """Names of tensors that would have to be padded, were `items` put into one call."""
    names = sorted({name for item in items for name in item} - {TOKENS})
    return [name for name in names if len({item[name].shape[1:] for item in items if name in item}) > 1]


def _alike(item: Item, facts: ModalityFacts) -> dict[str, Any]:
    """What items of one call must have in common: the tensors they have, and shapes that must not be padded."""
    common: dict[str, Any] = {}
    for name, tensor in item.items():
        if name == TOKENS:
            continue
        free = facts.batching is Batching.ROW or (facts.batching is Batching.PADDED and name in facts.padded)
        # The last extent of a strip grows; all others must agree.
        strip = tuple(tensor.shape[1:-1])
        common[name] = (strip if facts.batching is Batching.ROW else ()) if free else tuple(tensor.shape[1:])
    return common


def join(items: Sequence[Item], batching: Batching) -> dict[str, torch.Tensor]:
    """The tensors of one call, from items of one group."""
    names = [name for name in items[0] if name != TOKENS]
    if len(items) == 1:
        return {name: items[0][name] for name in names}
    if batching is Batching.ROW:
        return {name: _in_a_row([item[name] for item in items]) for name in names}
    if batching is Batching.SHIFTED:
        return {name: torch.cat(_shifted(items, name)) for name in names}
    return {name: _padded([item[name] for item in items]) for name in names}


def _padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after another along dim 0, padded with zeros behind to the largest."""
    largest = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [extent - size for size, extent in zip(part.shape[1:], largest, strict=True)]
        amounts = [amount for extra in reversed(missing) for amount in (0, extra)]
        padded.append(functional.pad(part, amounts) if any(missing) else part)
    return torch.cat(padded)


def _in_a_row(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images laid side by side in one strip [1, channels, height, width]; other tensors along dim 0."""
    strips = all(part.dim() >= 3 and part.shape[0] == 1 for part in parts)
    return torch.cat(list(parts), dim=-1 if strips else 0)


def _shifted(items: Sequence[Item], name: str) -> list[torch.Tensor]:
    """Positions among an item's patches as positions among those of the whole call; other tensors as they are."""
    if not name.endswith(_POOLING):
        return [item[name] for item in items]
    shifted, start = [], 0
    for item in items:
        shifted.append(torch.where(item[name] < 0, item[name], item[name] + start))
        start += next(tensor.shape[0] * tensor.shape[1] for key, tensor in item.items() if key.startswith("pixel"))
    return shifted
