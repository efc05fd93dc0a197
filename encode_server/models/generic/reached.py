"""Parts of a model that encode nothing, such as a generator of images: ranks need not load them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from encode_server.models.generic.compare import equal
from encode_server.models.generic.skeleton import LeftOut


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the memory of every tensor that an operation takes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
        self.memory.update(tensor.untyped_storage().data_ptr() for tensor in tensors)
        return func(*args, **kwargs or {})


def leave_out_unreached(
    model: nn.Module, encode: Callable[[nn.Module], Sequence[torch.Tensor]], want: Sequence[torch.Tensor]
) -> list[str]:
    """Takes the parts out of `model` whose tensors `encode` does not read, and returns their names.

    `encode` must run every modality that the model has. `want`: what `encode` gives. A part is a child of the model or
    of the model inside it. Nothing smaller is left out: single layers may serve media that no probe resembles.
    """
    reads = _Reads()
    with reads:
        encode(model)
    unread = {name: part for name, part in _parts(model) if not _read(part, reads.memory)}
    for name in unread:
        model.set_submodule(name, LeftOut())
    try:
        if equal(encode(model), want):
            return sorted(unread)
    except Exception:
        pass  # The model asks a part for more than its tensors.
    for name, part in unread.items():
        model.set_submodule(name, part)
    return []


def _parts(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The children that hold parameters of `model` and of the model inside it."""
    inner = model.base_model
    for name, child in model.named_children():
        if child is not inner:
            yield name, child
            continue
        yield from ((f"{name}.{below}", part) for below, part in child.named_children())


def _read(part: nn.Module, memory: set[int]) -> bool:
    """Whether an operation took a tensor of `part`, or `part` has none."""
    tensors = [*part.parameters(), *part.buffers()]
    return not any(True for _ in part.parameters()) or any(
        tensor.untyped_storage().data_ptr() in memory for tensor in tensors
    )
