"""Data sheets of GPUs, and from counted launches the time that they would take.

A model, not a measurement. What is assumed beside the data sheets stands here, each figure with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.card.ledger import Attention, Kind, Launch

HOST_S = 5e-6  # of eager torch's host thread for each launch
SHORTEST_S = 2e-6  # of a kernel, however small
LINEARS = 0.83  # of a large square product's rate: what products of a tower's widths reach
TILE = 64  # rows and keys that an attention kernel computes together, also where a segment is shorter
WIDTHS = (32, 64, 96, 128, 192, 256)  # of heads that flash attention has kernels for; others are filled up


@dataclass(frozen=True)
class Card:
    """A GPU. `peak`: dense bfloat16 operations a second by its data sheet; `memory`: bytes a second by its data sheet.

    `product`: share of the peak that a large square product reaches. `reached`: share of the memory's rate that a long
    kernel reaches. `flash2`, `flash3`: of the product's rate, what those attention kernels reach; 0: there is none.
    """

    name: str
    peak: float
    memory: float
    product: float
    reached: float
    flash2: float
    flash3: float = 0.0

    @property
    def product_rate(self) -> float:
        """Operations a second of a large square product: nothing runs faster."""
        return self.peak * self.product


CARDS = {
    card.name: card
    for card in (
        # 798 TFLOP/s measured by others. FlashAttention 2 was written for Ampere and reaches 300 here, 3 reaches 520.
        Card("H100", 989e12, 3.35e12, 0.807, 0.9, 0.376, 0.65),
        # The kernels of FlashAttention 2 use these two cards' instructions.
        Card("L40S", 362e12, 0.864e12, 0.8, 0.9, 0.65),
        # 150 W hold the clock down under a long product.
        Card("A10", 125e12, 0.6e12, 0.6, 0.9, 0.65),
        # hipBLASLt and AOTriton, by others' figures.
        Card("MI300X", 1307e12, 5.3e12, 0.5, 0.8, 0.45),
    )
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of one forward by part; `flops` of its products and its attention, without what is filled up."""

    linear_s: float
    attention_s: float
    rest_s: float
    host_s: float
    flops: int
    launches: int
    card: Card

    @property
    def seconds(self) -> float:
        """The device works while the host launches: the slower of the two counts."""
        return max(self.linear_s + self.attention_s + self.rest_s, self.host_s)

    @property
    def share(self) -> float:
        """Of the operations that a large square product would do in this time."""
        return self.flops / self.seconds / self.card.product_rate


def predict(launches: Iterable[Launch], card: Card, *, flash3: bool = False) -> Prediction:
    """What one forward of these launches takes on `card`. `flash3`: with FlashAttention 3, where the card has it."""
    linear = attention = rest = 0.0
    flops = count = 0
    for launch in launches:
        count += 1
        flops += launch.flops
        moved = (launch.read + launch.written) / (card.memory * card.reached)
        if launch.attention is not None:
            rate = card.product_rate * (card.flash3 if flash3 and card.flash3 else card.flash2)
            attention += max(_filled(launch.attention) / rate, moved, SHORTEST_S)
        elif launch.flops:
            linear += max(launch.flops / (card.product_rate * LINEARS), moved, SHORTEST_S)
        elif launch.kind is Kind.KERNEL:
            rest += max(moved, SHORTEST_S)
    return Prediction(linear, attention, rest, count * HOST_S, flops, count, card)


def _filled(attention: Attention) -> int:
    """Operations with what the kernel computes beyond heads and segments."""
    width = next((width for width in WIDTHS if width >= attention.width), attention.width)
    lengths = (-(-length // TILE) * TILE for length in attention.segments)
    return 4 * sum(length**2 for length in lengths) * attention.heads * width
