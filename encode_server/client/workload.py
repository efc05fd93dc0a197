"""How long an encoder would be busy with what it has, from what it says and what it was sent since it last said so."""

from __future__ import annotations

import time
from collections.abc import Mapping

from encode_server.wire.load import Load, cost_from, load_from

ITEM_S = 0.05  # device time of an item, before an encoder or an answer has said anything
COST_WEIGHT = 0.1  # of one answer in the mean cost of an item


class ItemCost:
    """Encoder tokens of an item, on average over all encoders: their traffic is one."""

    def __init__(self) -> None:
        self.tokens: float | None = None

    def observe(self, tokens: int) -> None:
        """An item took so many encoder tokens."""
        self.tokens = tokens if self.tokens is None else self.tokens + (tokens - self.tokens) * COST_WEIGHT

    def seconds(self, capacity: float | None) -> float:
        """Device time of an item at an encoder of this capacity."""
        return self.tokens / capacity if self.tokens is not None and capacity else ITEM_S


class Workload:
    """One encoder's work. `sent`, `unsent` and `ended` tell of items; `note` takes an answer's headers."""

    def __init__(self, item_cost: ItemCost) -> None:
        self._item_cost = item_cost
        self._load: Load | None = None
        self._said_at = 0.0
        self._unreported = 0  # items sent since the encoder last spoke
        self.in_flight = 0

    @property
    def item_s(self) -> float:
        """Seconds that an average item takes here."""
        return self._item_cost.seconds(self._load.capacity if self._load else None)

    @property
    def seconds(self) -> float:
        """Seconds until this encoder could begin with something new."""
        if self._load is None:
            return self.in_flight * self.item_s
        left = max(0.0, self._load.backlog_s - (time.monotonic() - self._said_at))
        return left + min(self._unreported, self.in_flight) * self.item_s

    def sent(self, items: int) -> None:
        """The encoder was given so many items."""
        self.in_flight += items
        self._unreported += items

    def unsent(self, items: int) -> None:
        """So many items were only planned, and never given to the encoder."""
        self.in_flight -= items
        self._unreported = max(0, self._unreported - items)

    def ended(self, items: int) -> None:
        """So many items are answered, or were given up."""
        self.in_flight -= items

    def note(self, headers: Mapping[str, str]) -> None:
        """Learn from an answer."""
        if (load := load_from(headers)) is not None:
            self.say(load)
        if tokens := cost_from(headers):
            self._item_cost.observe(tokens)

    def say(self, load: Load) -> None:
        """The encoder said how much work it has."""
        self._load, self._said_at, self._unreported = load, time.monotonic(), 0
