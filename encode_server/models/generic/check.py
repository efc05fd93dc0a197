"""Finding out, by running the encoder, how a family's items become rows and which of them may share a call.

Nothing here knows a family. Whatever cannot be shown to be right is not done: a batch that differs from its items
alone is encoded one by one, and a modality whose rows are not what the language model receives is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from encode_server.errors import first_line
from encode_server.models.generic.classes import ModelClass
from encode_server.models.generic.compare import equal
from encode_server.models.generic.features import Features, cast
from encode_server.models.generic.joining import TOKENS, Item, unlike
from encode_server.models.generic.media import MediaProcessor, Processed, video_options
from encode_server.wire.checkpoint import Batching, ModalityFacts, Proof, Route
from encode_server.wire.modality import Modality

_IMAGES = ((90, 150), (230, 120), (64, 64), (300, 800))
"""Height and width. The last is large enough for families that cut only large images into tiles."""
_CLIPS = ((8, 60, 90), (4, 120, 70), (8, 60, 60), (4, 300, 800))
"""Frames, height and width; the last for families that cut frames into tiles."""
_SECONDS = (1.93, 0.6, 5.27)


class Refused(Exception):
    """A modality that this server cannot encode rightly. The message says which check failed."""


@dataclass(frozen=True)
class Checked:
    """A modality that can be encoded rightly. `items`: the probes, as they travel to the ranks. `rows`: of each."""

    facts: ModalityFacts
    items: list[dict[str, torch.Tensor]]
    rows: list[torch.Tensor]


def probes(modality: Modality, rate: int) -> list[tuple[Any, dict[str, Any]]]:
    """Unlike media of noise, decoded, with the options of each. `rate`: samples per second of audio."""
    random = np.random.default_rng(0)
    if modality is Modality.IMAGE:
        return [(Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)), {}) for size in _IMAGES]
    if modality is Modality.VIDEO:
        return [(random.integers(0, 256, (*size, 3), dtype=np.uint8), _clip_options(*size)) for size in _CLIPS]
    return [(random.uniform(-0.5, 0.5, round(length * rate)).astype(np.float32), {}) for length in _SECONDS]


def check(model: Any, found: ModelClass, modality: Modality, processor: MediaProcessor) -> Checked:
    """How to encode `modality` with the stripped `model`, which is on the CPU in float32.

    Raises:
        Refused: no way gives what the language model receives, or the number of rows that the prompt has room for.
    """
    rate = int(getattr(processor.part(modality), "sampling_rate", 16_000))
    try:
        processed = [processor(modality, media, options) for media, options in probes(modality, rate)]
    except Exception as error:
        raise Refused(f"the processor refuses {modality}: {first_line(error)}") from error
    items = [{**one.taken(), TOKENS: torch.tensor(one.tokens)} for one in processed]
    features = Features(model, found, modality)
    want, reason = _received(model, features, processed)
    facts, alone = _route(features, items, processed[0].token, want, reason)
    return Checked(_batching(features, items, alone, facts), items, alone)


def _received(model: Any, features: Features, items: Sequence[Processed]) -> tuple[list[torch.Tensor] | None, str]:
    """What the language model receives for each item in the prompt that the processor makes; or why that is unknown."""
    try:
        inputs = [cast({**item.prompt, **item.tensors}, model.device, model.dtype) for item in items]
        with _NothingLeftOver():  # type: ignore[no-untyped-call]
            return [features.receive(one, item.token) for one, item in zip(inputs, items, strict=True)], ""
    except Refused:
        raise
    except Exception as error:
        reason = f"{type(model).__name__} of transformers {transformers.__version__} fails on what its own processor"
        return None, f"{reason} makes: {first_line(error)}"


class _NothingLeftOver(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses a model that puts fewer rows into its prompt than its encoder gave: `masked_scatter` ignores the rest.

    The rows that the language model receives would then be right, and too few.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.masked_scatter, torch.ops.aten.masked_scatter_):
            target, mask, source = args
            there, dim = int(mask.expand_as(target).sum()), target.shape[-1]
            if there < source.numel():
                raise Refused(
                    f"the encoder gives {source.numel() // dim} rows, and the processor makes room for {there // dim}"
                )
        return func(*args, **kwargs or {})


def _route(
    features: Features, items: Sequence[Item], token: int, want: Sequence[torch.Tensor] | None, reason: str
) -> tuple[ModalityFacts, list[torch.Tensor]]:
    """The first route that gives `want`, or, where that is unknown, rows for all placeholders; and its rows."""
    proof = Proof.COUNTED if want is None else Proof.RECEIVED
    for route in Route:
        facts = ModalityFacts(0, token, route, Batching.ALONE, proof)
        try:
            alone = features.run(items, facts, torch.device("cpu"))
        except Exception as error:
            reason = reason or first_line(error)
            continue
        if want is None or equal(alone, want):
            return msgspec.structs.replace(facts, dim=alone[0].shape[-1]), alone
        reason = reason or "the rows are not those that the language model receives"
    raise Refused(reason)


def _batching(
    features: Features, items: Sequence[Item], alone: Sequence[torch.Tensor], facts: ModalityFacts
) -> ModalityFacts:
    """`facts` with the best way to put unlike items into one call that gives the rows of each alone."""
    # The first twice: an error that needs two alike items shows as well.
    batch, want = [*items, items[0]], [*alone, alone[0]]
    for batching in Batching:
        candidate = msgspec.structs.replace(facts, batching=batching, padded=unlike(items))
        try:
            if equal(features.run(batch, candidate, torch.device("cpu")), want):
                return candidate
        except Exception:
            continue  # The family cannot take such a batch.
    return facts


def _clip_options(frames: int, height: int, width: int) -> dict[str, Any]:
    """Options for a clip at 2 frames per second, all of them chosen."""
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(
        total_num_frames=frames, fps=2.0, width=width, height=height, duration=frames / 2, video_backend="pyav"
    )
    metadata.frames_indices = list(range(frames))
    return video_options(metadata)
