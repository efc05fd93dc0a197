"""What a checkpoint's forward would take on a GPU that is not there: `uv run python -m benchmarks.roofline`.

Launches, bytes and operations are counted on an emulated device; data sheets turn them into milliseconds, and into the
share of what a large square product reaches. A model: `python -m benchmarks.gpu` on a card confirms or refutes it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.card.count import BEFORE, count, write_config
from benchmarks.card.ledger import Kind, Launch
from benchmarks.card.sheets import CARDS, Card, Prediction, predict
from benchmarks.towers import FULL_SIZE, Tower, model_and_config, processors
from encode_server.media.limits import MediaLimits
from encode_server.media.unique import jpeg
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import open_directory
from encode_server.models.speedups import Speedup
from encode_server.wire.modality import Modality

SIDES = (224, 448, 896, 1344, 1792)
BATCH = 16384  # patches: `--image-batch-tokens`

Items = list[Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Way:
    """One way to run a tower. `flash3`: FlashAttention 3 where the card has it."""

    name: str
    speedups: frozenset[Speedup] = frozenset(Speedup)
    triton: bool = True
    flash3: bool = False


FUSED = "fused"
"""The way that a rank takes where Triton works."""

WAYS = (
    Way("transformers' kernels", BEFORE),
    Way("fused, no Triton", triton=False),
    Way(FUSED),
    Way("fused, FlashAttention 3", flash3=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print, and with `--json` write, a row for each tower, size and way; 2 for a tower or card that is not known."""
    parser = argparse.ArgumentParser(prog="benchmarks.roofline", description=__doc__)
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="a checkpoint with images [the towers of released sizes]"
    )
    parser.add_argument("--card", default="H100", help=f"of {', '.join(CARDS)} [H100]")
    parser.add_argument("--sizes", default=",".join(map(str, SIDES)), help="sides of square images in pixels")
    parser.add_argument("--alone", action="store_true", help="one image at a time, not full batches")
    parser.add_argument("--way", choices=[way.name for way in WAYS], help="one of the ways to run a tower [all]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    args = parser.parse_args(argv)
    if args.card not in CARDS:
        print(f"no data sheet of {args.card!r}: take one of {', '.join(CARDS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    ways = [way for way in WAYS if args.way in (None, way.name)]
    sides = [int(side) for side in args.sizes.split(",")]
    rows: list[dict[str, Any]] = []
    console = Console(width=None if sys.stdout.isatty() else 150)
    with tempfile.TemporaryDirectory() as folder:
        directories = {str(args.model): args.model} if args.model else released(Path(folder))
        for name, directory in directories.items():
            found = tower_rows(name, directory, sides, CARDS[args.card], alone=args.alone, ways=ways)
            console.print(table(name, args.card, found))
            rows += found
    console.print("Predicted from counts and data sheets: no card has run this.")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def released(folder: Path, towers: Mapping[str, Tower] = FULL_SIZE) -> dict[str, Path]:
    """Directories without weights of the towers of released sizes, by name."""
    return {
        name: write_config(model_and_config(tower)[1], processors(tower), folder / tower.model_type)
        for name, tower in towers.items()
    }


def tower_rows(
    name: str, directory: Path, sides: Sequence[int], card: Card, *, alone: bool = False, ways: Sequence[Way] = WAYS
) -> list[dict[str, Any]]:
    """A row for each size and way, as they are printed and written."""
    rows = []
    for side in sides:
        items = batch(directory, side, alone=alone)
        for way in ways:
            launches = count(directory, Modality.IMAGE, items, speedups=way.speedups, triton=way.triton)
            if not (way.flash3 and not card.flash3):
                rows.append(_row(name, side, len(items), way, launches, predict(launches, card, flash3=way.flash3)))
    return rows


def batch(directory: Path, side: int, *, alone: bool = False) -> Items:
    """As many square images as a rank gets in one batch: their prepared tensors."""
    preprocessor = Preprocessor(open_directory(directory), MediaLimits())
    prepared = preprocessor.prepare(Modality.IMAGE, jpeg(side, side, 0).copy())
    return [dict(prepared.tensors)] * (1 if alone else max(1, BATCH // prepared.cost))


def _row(name: str, side: int, images: int, way: Way, launches: list[Launch], found: Prediction) -> dict[str, Any]:
    kernels = [launch for launch in launches if launch.kind is Kind.KERNEL]
    return {
        "tower": name,
        "card": found.card.name,
        "side": side,
        "images": images,
        "way": way.name,
        "launches": len(kernels),
        "gigabytes": sum(launch.read + launch.written for launch in kernels) / 1e9,
        "tflop": found.flops / 1e12,
        "linear_ms": found.linear_s * 1e3,
        "attention_ms": found.attention_s * 1e3,
        "rest_ms": found.rest_s * 1e3,
        "host_ms": found.host_s * 1e3,
        "ms": found.seconds * 1e3,
        "images_per_s": images / found.seconds,
        "share": found.share,
    }


def table(name: str, card: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of one tower."""
    made = Table(title=f"{name} on {card}, predicted", min_width=100)
    made.add_column("images")
    made.add_column("way")
    columns = ("launches", "GB", "linear ms", "attention ms", "rest ms", "host ms", "in all ms", "images/s", "share")
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(
            f"{row['side']}² × {row['images']}",
            row["way"],
            str(row["launches"]),
            f"{row['gigabytes']:.1f}",
            *(f"{row[part]:.1f}" for part in ("linear_ms", "attention_ms", "rest_ms", "host_ms", "ms")),
            f"{row['images_per_s']:.0f}",
            f"{row['share']:.0%}",
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
