"""What tensor parallelism can cut in any model, recognised by its modules: attention by head, MLPs by width.

A module that is not understood entirely stays whole on every rank, which is always right and only larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn

_TRIPLES = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("wq", "wk", "wv"))
_FUSED = ("qkv", "qkv_proj")
_OUTPUTS = ("out_proj", "o_proj", "proj", "projection", "projection_layer", "dense", "to_out", "wo")
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "heads", "num_key_value_heads", "num_kv_heads")
_WIDTHS = ("embed_dim", "all_head_size", "inner_dim")
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
    (("linear_fc1",), "linear_fc2"),
    (("linear1",), "linear2"),
    (("linear_1",), "linear_2"),
    (("lin1",), "lin2"),
    (("w1", "w3"), "w2"),
    (("c_fc",), "c_proj"),
)


@dataclass(frozen=True)
class Block:
    """Linears that are cut together: a rank keeps a part of what `into` put out, and of what `out` takes in.

    `owner`: name of the module whose attributes `counts` (heads, widths) shrink with its Linears. `parts`: sizes of
    what each of `into` stacks along its outputs, each cut for itself. `units`: numbers of heads, each of which the
    number of ranks must divide; empty for an MLP, whose width may be cut anywhere. `kind`: class of the owner.
    """

    owner: str
    kind: str
    into: tuple[str, ...]
    out: str
    parts: tuple[tuple[int, ...], ...]
    counts: tuple[str, ...] = ()
    units: tuple[int, ...] = ()

    def divides(self, world: int) -> bool:
        """Whether `world` ranks can share the block evenly; widths of MLPs may be uneven."""
        return all(unit % world == 0 for unit in self.units)


def find_blocks(model: nn.Module) -> list[Block]:
    """Everything in `model` that can be cut, attention first. No Linear is part of two blocks."""
    modules = dict(model.named_modules())
    blocks, taken = [], set[str]()
    for find in (_attention, _mlp, _sequential, _siblings):
        for name, module in modules.items():
            for block in find(name, module, modules):
                names = {*block.into, block.out}
                if not names & taken:
                    taken |= names
                    blocks.append(block)
    return blocks


def _attention(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> Iterator[Block]:
    into = _into(module)
    if into is None or any(True for _ in module.parameters(recurse=False)):
        return
    linears = [_linear(module, child) for child in into]
    if any(linear is None for linear in linears):
        return
    out = next((child for child in _OUTPUTS if _linear(module, child) is not None), None)
    out_path = f"{name}.{_through(module, out)}" if out is not None else _bert_output(name, modules)
    if out_path is None:
        return
    out_linear = modules[out_path]
    assert isinstance(out_linear, nn.Linear)
    heads = _head_count(module)
    parts = _parts(module, [linear for linear in linears if linear is not None])
    if heads is None or parts is None:
        return
    width = parts[0][0]
    dim = width // heads
    if width % heads or out_linear.in_features != width or any(size % dim for sizes in parts for size in sizes):
        return
    if not _understood(module, [*into, *([out] if out is not None else [])], dim):
        return
    owned = {size // dim for sizes in parts for size in sizes}
    yield Block(
        owner=name,
        kind=type(module).__name__,
        into=tuple(f"{name}.{_through(module, child)}" for child in into),
        out=out_path,
        parts=parts,
        counts=_counts(module, owned, width),
        units=tuple(owned),
    )


def _into(module: nn.Module) -> tuple[str, ...] | None:
    children = dict(module.named_children())
    for names in (*_TRIPLES, *((name,) for name in _FUSED)):
        if all(name in children for name in names):
            return names
    return None


def _through(module: nn.Module, child: str) -> str:
    """Path of the Linear that `child` is, or that it wraps."""
    inner = getattr(module, child)
    if isinstance(inner, nn.Linear):
        return child
    [(name, _)] = [(name, part) for name, part in inner.named_children() if isinstance(part, nn.Linear)]
    return f"{child}.{name}"


def _linear(module: nn.Module, child: str) -> nn.Linear | None:
    """The Linear that `child` is, or the only one inside it where nothing else has parameters."""
    inner = getattr(module, child, None)
    if isinstance(inner, nn.Linear):
        return inner
    if not isinstance(inner, nn.Module) or any(True for _ in inner.parameters(recurse=False)):
        return None
    with_parameters = [part for part in inner.children() if any(True for _ in part.parameters())]
    if len(with_parameters) == 1 and isinstance(with_parameters[0], nn.Linear):
        return with_parameters[0]
    return None


def _bert_output(name: str, modules: dict[str, nn.Module]) -> str | None:
    """BERT keeps the output beside the attention: `attention.self` and `attention.output.dense`."""
    parent = name.rpartition(".")[0]
    path = f"{parent}.output.dense" if parent else "output.dense"
    return path if isinstance(modules.get(path), nn.Linear) else None


def _head_count(module: nn.Module) -> int | None:
    config: Any = getattr(module, "config", None)
    for owner in (module, config):
        for name in _HEADS[:4]:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _parts(module: Any, linears: list[nn.Linear]) -> tuple[tuple[int, ...], ...] | None:
    if len(linears) > 1:
        return tuple((linear.out_features,) for linear in linears)
    size = linears[0].out_features
    q, kv = getattr(module, "q_dim", None), getattr(module, "kv_dim", None)
    if isinstance(q, int) and isinstance(kv, int):
        return ((q, kv, kv),) if q + 2 * kv == size else None
    return ((size // 3,) * 3,) if size % 3 == 0 else None


def _understood(module: nn.Module, known: list[str], dim: int) -> bool:
    """Whether what else has parameters works on single heads."""
    for name, child in module.named_children():
        if name in known:
            continue
        if any(weight.shape != (dim,) for weight in child.parameters()):
            return False
    return True


def _counts(module: nn.Module, owned: set[int], width: int) -> tuple[str, ...]:
    heads = [name for name in _HEADS if getattr(module, name, None) in owned]
    return (*heads, *(name for name in _WIDTHS if getattr(module, name, None) == width))


def _mlp(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> Iterator[Block]:
    for names_in, name_out in _MLPS:
        into, out = [_linear(module, child) for child in names_in], _linear(module, name_out)
        if out is None or any(linear is None or linear.out_features != out.in_features for linear in into):
            continue
        prefix = f"{name}." if name else ""
        yield _pair(
            name,
            type(module).__name__,
            tuple(f"{prefix}{_through(module, child)}" for child in names_in),
            f"{prefix}{_through(module, name_out)}",
            out.in_features,
        )


def _sequential(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> Iterator[Block]:
    """Two Linears of a list with nothing between them that has parameters."""
    if not isinstance(module, nn.Sequential | nn.ModuleList):
        return
    with_parameters = [(child, part) for child, part in module.named_children() if any(True for _ in part.parameters())]
    for (first, into), (second, out) in pairwise(with_parameters):
        if isinstance(into, nn.Linear) and isinstance(out, nn.Linear) and into.out_features == out.in_features:
            owner = name.rpartition(".")[0]
            kind = type(modules[owner]).__name__ if owner in modules else type(module).__name__
            yield _pair(name, kind, (f"{name}.{first}",), f"{name}.{second}", out.in_features)


def _siblings(name: str, module: nn.Module, modules: dict[str, nn.Module]) -> Iterator[Block]:
    """BERT's MLP: `intermediate.dense` and `output.dense`."""
    into, out = modules.get(f"{name}.intermediate.dense"), modules.get(f"{name}.output.dense")
    if isinstance(into, nn.Linear) and isinstance(out, nn.Linear) and into.out_features == out.in_features:
        yield _pair(
            name, type(module).__name__, (f"{name}.intermediate.dense",), f"{name}.output.dense", out.in_features
        )


def _pair(owner: str, kind: str, into: tuple[str, ...], out: str, width: int) -> Block:
    return Block(owner=owner, kind=kind, into=into, out=out, parts=((width,),) * len(into))
