"""Every model type of the installed transformers: whether this server encodes with it, and how that is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from encode_server.models.generic.classes import ModelClass, class_of
from encode_server.models.registry import ARCHITECTURES
from encode_server.models.tested import NOTHING_RECEIVES, REFUSED, SURVEYED, TESTED
from encode_server.wire.modality import Modality

_HEAD = """# Models

Every model type of transformers {version}; `python -m encode_server.models.table` writes this page.

- **own rules**: a family with a faster forward, compared with transformers in `tests/models`.
- **tested**: the generic path; a tiny checkpoint of real classes is compared with what the language model receives.
- **surveyed**: as the next, and a checkpoint that `tests/models/survey.py` makes of the default configuration, shrunk,
  passes.
- **when it is loaded**: the generic path; every checkpoint is run once on media of noise before the server takes
  requests. Rows must be what the language model receives in the model's own forward, a batch must give the rows of
  each item alone, shards must add up. What cannot be shown is not offered, and the log says why.

Tensor parallelism cuts attention by head and MLPs by width wherever it recognises them; all else, and heads that the
number of ranks does not divide, stays whole on every rank. Batches: *padded* to the largest item, laid in one *row*,
of *equal* shapes only, *shifted* (positions among the patches of the whole call), or *packed* (one after another
without padding, attention within each item only); *alone*: one item a call.

Loading reads the encoder's tensors and none of the language model's, its head's or its word table's.
`tests/models/test_reads.py` checks this for every class below that can be built from its default configuration. Ranks
also leave out parts that encode nothing (Janus's generator of images): children of the model whose tensors
no probe of any modality reads. Peak
memory of loading, beyond what the imports take, for checkpoints in bfloat16: {memory}.

| model type | class | encodes | batch | checked |
| --- | --- | --- | --- | --- |"""

_MEMORY = (
    "Gemma 3, 433 MiB for an encoder of 422 (file 3.2 GiB); T5Gemma 2, 435 for 422 (11.3 GiB); LLaVA, 438 for 426 "
    "(1.7 GiB); Qwen2.5-VL, 534 for 523 (1.9 GiB)"
)
"""As `tests/models/test_reads.py` printed, on 2 CPU cores."""

_NOTHING_RECEIVES = (
    "Their configurations name no token that an image, a video or audio takes the place of (models that compare images "
    "with text, segment or transcribe), so that no rows of theirs can be checked:"
)
_REFUSED = "Their classes give no image, video or audio features, or need a package that is not installed:"


@dataclass(frozen=True)
class Row:
    """One model type. `cls`: transformers' class that is loaded, empty for a family with rules of its own.
    `modalities`: what is encoded, or what the class has an encoder for. `batching`: how items share a call, where that
    is known. `checked`: how it is known to be right."""

    model_type: str
    cls: str
    modalities: tuple[Modality, ...]
    batching: str
    checked: str


def supported() -> list[Row]:
    """The model types that this server encodes with, sorted by name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    rows = [_row(name) for name in sorted({*CONFIG_MAPPING_NAMES, *ARCHITECTURES})]
    return [row for row in rows if row is not None]


def unsupported() -> list[str]:
    """The model types of transformers whose classes give no image, video or audio features, sorted by name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    # One name there is a class's, not a model type's: no config.json has it.
    return [name for name in sorted(CONFIG_MAPPING_NAMES) if name != "EvollaModel" and _row(name) is None]


def as_text(rows: Iterable[Row]) -> str:
    """A table for a terminal."""
    cells = [
        ("model type", "encodes", "batch", "checked"),
        *((r.model_type, _names(r), r.batching, r.checked) for r in rows),
    ]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(row[:3], widths, strict=True)), row[3]]) for row in cells
    )


def as_markdown() -> str:
    """docs/models.md."""
    import transformers

    lines = [_HEAD.format(version=transformers.__version__, memory=_MEMORY)]
    for row in supported():
        lines.append(f"| {row.model_type} | {row.cls} | {_names(row)} | {row.batching} | {row.checked} |")
    lines += ["", "## Refused", "", _NOTHING_RECEIVES, "", _listed(sorted(NOTHING_RECEIVES))]
    others = [name for name in unsupported() if name not in NOTHING_RECEIVES]
    lines += ["", _REFUSED, "", _listed(others)]
    return "\n".join(lines) + "\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) + "."


def _row(model_type: str) -> Row | None:
    if (architecture := ARCHITECTURES.get(model_type)) is not None:
        return Row(model_type, "", tuple(sorted(architecture.modalities)), "packed", "own rules")
    if model_type in NOTHING_RECEIVES:
        return None
    try:
        # A model that also speaks keeps what sees and hears in a part of its own.
        found = class_of(model_type) or class_of(f"{model_type}_thinker")
    except ImportError:  # a package that none of our families needs
        return None
    if found is None:
        return None
    if (tested := TESTED.get(model_type) or TESTED.get(f"{model_type}_thinker")) is not None:
        refused = "".join(f"; no {name}: {why}" for name, why in REFUSED.get(model_type, {}).items())
        kinds = tuple(sorted(tested))
        batching = ", ".join(dict.fromkeys(tested[kind].value for kind in kinds))
        return Row(model_type, found.__name__, kinds, batching, f"tested{refused}")
    if (surveyed := SURVEYED.get(model_type)) is not None:
        kinds = tuple(sorted(surveyed))
        batching = ", ".join(dict.fromkeys(surveyed[kind].value for kind in kinds))
        return Row(model_type, found.__name__, kinds, batching, "surveyed")
    named = ModelClass(found, None)
    kinds = tuple(kind for kind in sorted(Modality) if named.has_own(kind))
    return Row(model_type, found.__name__, kinds, "", "when it is loaded")


def _names(row: Row) -> str:
    return ", ".join(row.modalities)


if __name__ == "__main__":
    print(as_markdown(), end="")
