"""What is asked of the pipeline, and what it answers with."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import msgspec

from encode_server.delivery.frames import ItemInfo
from encode_server.modality import Modality
from encode_server.models.prepared import ItemOptions
from encode_server.pipeline.admission import Ticket
from encode_server.pipeline.work import embedding_bytes


@dataclass(frozen=True)
class MediaItem:
    """One item of a request: a URL, data URI, base64 text, or the media bytes. `uuid`: its name in a store."""

    source: str | bytes
    options: ItemOptions = field(default_factory=ItemOptions)
    content_hash: str | None = None
    uuid: str | None = None

    def with_fps(self, fps: float) -> MediaItem:
        """The same, with so many frames per second where its options do not choose frames."""
        if self.options.fps is not None or self.options.num_frames is not None:
            return self
        return replace(self, options=msgspec.structs.replace(self.options, fps=fps))


@dataclass
class EncodeRequest:
    """A request in work. `deadline` is of `time.monotonic()`; `stages` collects seconds by stage for its log line."""

    req_id: str
    modality: Modality
    items: list[MediaItem]
    deadline: float
    ticket: Ticket | None = None  # the health probe has none
    urgent: bool = False
    stages: dict[str, float] = field(default_factory=dict)

    def spent(self, stage: str, seconds: float) -> None:
        """Note a stage's time; items run side by side, so the longest counts."""
        self.stages[stage] = max(self.stages.get(stage, 0.0), seconds)

    @property
    def client(self) -> str:
        """Who asked, for fairness."""
        return self.ticket.client if self.ticket else ""

    def weigh(self, *, nbytes: int = 0, tokens: int = 0) -> None:
        """Count what is now known of the request, see `Ticket.weigh`."""
        if self.ticket:
            self.ticket.weigh(nbytes=nbytes, tokens=tokens)

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; not negative."""
        return max(0.0, self.deadline - time.monotonic())


@dataclass(frozen=True)
class EncodedItem:
    """An item's embedding: `data` holds tokens × dim values on the heap, never written to again."""

    info: ItemInfo
    extra: dict[str, float | int | list[float] | list[int]]
    data: memoryview


@dataclass
class Encoded:
    """All items of a request, encoded: [tokens, dim] when put one after another."""

    modality: Modality
    model: str
    dtype: str
    dim: int
    items: list[EncodedItem]

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens of all items, dim)."""
        return sum(item.info.tokens for item in self.items), self.dim

    @property
    def nbytes(self) -> int:
        """Size of the embedding in bytes."""
        return embedding_bytes(*self.shape, self.dtype)

    def contiguous(self) -> memoryview:
        """The whole embedding as one buffer: the item's own where there is one item, else a copy."""
        if len(self.items) == 1:
            return self.items[0].data
        joined = bytearray(self.nbytes)
        offset = 0
        for item in self.items:
            joined[offset : offset + item.data.nbytes] = item.data
            offset += item.data.nbytes
        return memoryview(joined)
