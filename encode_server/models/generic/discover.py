"""What must be known of a checkpoint of a family without rules of its own, found out by running it once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from encode_server.errors import StartupError
from encode_server.models.generic.check import Checked, Refused, check
from encode_server.models.generic.compare import equal
from encode_server.models.generic.features import Features
from encode_server.models.generic.reached import leave_out_unreached
from encode_server.models.generic.shards import Encode, whole_kinds
from encode_server.models.speedups import Speedup, speed_up
from encode_server.models.structure import find_blocks
from encode_server.wire.checkpoint import Facts
from encode_server.wire.modality import Modality

if TYPE_CHECKING:
    from encode_server.models.families.generic import Generic


_SPEEDUPS = tuple(speedup for speedup in Speedup if speedup is not Speedup.ALIGN)
"""All that the CPU can show to be harmless."""


@torch.inference_mode()
def discover(family: Generic, world: int) -> Facts:
    """The facts of the family's checkpoint, for `world` ranks. Loads the encoder in float32 on the CPU.

    Raises:
        StartupError: the encoder or a processor cannot be loaded, or no modality can be shown to be encoded rightly.
    """
    modalities = family.modalities
    model: Any = family.load(torch.float32)
    checked: dict[Modality, Checked] = {}
    refused: dict[Modality, str] = {}
    for modality in sorted(modalities):
        try:
            checked[modality] = check(model, family.found, modality, family.media)
        except Refused as refusal:
            refused[modality] = str(refusal)
    if not checked:
        reason = "; ".join(refused.values()) or "it has no processor for what its encoder takes"
        raise StartupError(
            f"model {family.checkpoint.name!r}: {family.found.cls.__name__} cannot be encoded with: {reason}"
        )

    def encode(candidate: Any) -> list[torch.Tensor]:
        rows: list[torch.Tensor] = []
        for modality, one in checked.items():
            features = Features(candidate, family.found, modality)
            rows += features.run(one.items, one.facts, torch.device("cpu"))
        return rows

    want = [row for one in checked.values() for row in one.rows]
    unprobed = [modality for modality in Modality if family.found.has_own(modality) and modality not in checked]
    left_out = [] if unprobed else leave_out_unreached(model, encode, want)
    return Facts(
        modalities={modality: one.facts for modality, one in checked.items()},
        refused=refused,
        whole=whole_kinds(model, world, encode, want) if world > 1 else [],
        undivided=sorted({block.kind for block in find_blocks(model) if not block.divides(world)}),
        speedups=_harmless(model, encode, want),
        left_out=left_out,
    )


def _harmless(model: Any, encode: Encode, want: Sequence[torch.Tensor]) -> list[str]:
    """The changes for speed that leave the rows alone: all together, or else each that does so by itself."""
    if _holds(model, _SPEEDUPS, encode, want):
        return list(_SPEEDUPS)
    single = [speedup for speedup in _SPEEDUPS if _holds(model, [speedup], encode, want)]
    return list(single) if _holds(model, single, encode, want) else []


def _holds(model: Any, speedups: Sequence[Speedup], encode: Encode, want: Sequence[torch.Tensor]) -> bool:
    """Whether the model gives the same rows after `speedups`, which are made to a copy."""
    changed = copy.deepcopy(model)
    try:
        speed_up(changed, speedups)
        return equal(encode(changed), want)
    except Exception:
        return False  # Whatever the family cannot do in this form.
