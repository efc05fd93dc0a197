"""What every way of delivering an embedding to a destination has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from encode_server.errors import EncodeError
from encode_server.wire.embedding import Encoded
from encode_server.wire.modality import Modality


@dataclass(frozen=True)
class Part:
    """Which part of whose request is delivered."""

    req_id: str
    part_idx: int
    num_parts: int
    modality: Modality
    model: str


class Delivery(Protocol):
    """Takes one part's embedding, or the reason why there is none, to where it was asked for."""

    async def deliver(self, part: Part, encoded: Encoded) -> None:
        """Returns when the destination has it. Raises DeliveryFailed."""

    async def fail(self, part: Part, error: EncodeError) -> None:
        """Tell the destination, as far as it listens, without waiting for it; raises nothing."""


class Kept:
    """No delivery: the embedding stays in this server's cache, for a request that will ask for the same media."""

    async def deliver(self, part: Part, encoded: Encoded) -> None:
        """See `Delivery`."""

    async def fail(self, part: Part, error: EncodeError) -> None:
        """See `Delivery`."""
