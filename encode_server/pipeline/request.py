"""What is asked of the pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from encode_server.errors import TooLarge
from encode_server.pipeline.admission import Ticket
from encode_server.wire.embedding import OutgoingRoom, Recall
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality
from encode_server.wire.pools import Pool


@dataclass(frozen=True)
class MediaItem:
    """One item of a request: a URL, data URI, base64 text (a long one in pieces), or the media bytes. `uuid`: its name
    in a store."""

    source: str | tuple[str, ...] | bytes
    options: ItemOptions = field(default_factory=ItemOptions)
    content_hash: str | None = None
    uuid: str | None = None

    @property
    def nbytes(self) -> int:
        """What the source takes of memory, about."""
        return sum(map(len, self.source)) if isinstance(self.source, tuple) else len(self.source)

    def with_fps(self, fps: float) -> MediaItem:
        """The same, with so many frames per second where its options do not choose frames."""
        if self.options.fps is not None or self.options.num_frames is not None:
            return self
        return replace(self, options=msgspec.structs.replace(self.options, fps=fps))

    def with_pool(self, pool: Pool) -> MediaItem:
        """The same, one vector in place of its rows."""
        return replace(self, options=msgspec.structs.replace(self.options, pool=pool))


@dataclass
class EncodeRequest:
    """A request in progress. `deadline` is of `time.monotonic()`; `stages` collects seconds by stage for its log line.
    `ticket`: the request's place in the admission, which a health probe does not take. `max_embedding_bytes`: of all
    its items together. `recall`: finds an item where a former request has left it. `on_rows`: called once, with the
    rows of its embedding, as soon as all items have been prepared or found. `outgoing`: where the embedding had
    best lie for its delivery."""

    req_id: str
    modality: Modality
    items: list[MediaItem]
    deadline: float
    ticket: Ticket | None = None
    stages: dict[str, float] = field(default_factory=dict)
    max_embedding_bytes: int | None = None
    recall: Recall | None = None
    on_rows: Callable[[int], None] | None = None
    outgoing: OutgoingRoom | None = None
    _embedding_bytes: int = 0
    _rows: dict[int, int] = field(default_factory=dict)
    _embeddings: set[int] = field(default_factory=set)

    def spent(self, stage: str, seconds: float) -> None:
        """Note a stage's time; items run concurrently, so the longest counts."""
        self.stages[stage] = max(self.stages.get(stage, 0.0), seconds)

    @property
    def encoded_tokens(self) -> int:
        """Encoder tokens that this request has cost so far: what the cache had cost nothing."""
        return self.ticket.tokens if self.ticket else 0

    @property
    def client(self) -> str:
        """Who asked, for fairness."""
        return self.ticket.client if self.ticket else ""

    @property
    def pool(self) -> Pool | None:
        """How its items are pooled, all alike."""
        return self.items[0].options.pool if self.items else None

    def has_rows(self, item: MediaItem, rows: int) -> None:
        """One of its items will have so many rows."""
        self._rows[id(item)] = rows
        if self.on_rows is not None and len(self._rows) == len(self.items):
            told, self.on_rows = self.on_rows, None
            told(sum(self._rows.values()))

    def weigh(self, *, nbytes: int = 0, tokens: int = 0) -> None:
        """Count what is now known of the request, see `Ticket.weigh`."""
        if self.ticket:
            self.ticket.weigh(nbytes=nbytes, tokens=tokens)

    async def grow(self, nbytes: int) -> None:
        """Count bytes that arrive, before they are kept, see `Ticket.grow`."""
        if self.ticket:
            await self.ticket.grow(nbytes)

    def expect(self, nbytes: int) -> None:
        """Count an item's embedding before the item is encoded. Raises TooLarge beyond the request's bound, and as
        `weigh` does: the embedding will lie on the heap until all items are delivered."""
        self._count_embedding(nbytes)
        self.weigh(nbytes=nbytes)

    def share(self, embedding: memoryview) -> None:
        """Count an item's embedding that was encoded already. Its memory counts once, however many items have it: the
        cache may drop it meanwhile. Raises as `expect` does."""
        self._count_embedding(embedding.nbytes)
        if id(embedding) not in self._embeddings:
            self._embeddings.add(id(embedding))
            self.weigh(nbytes=embedding.nbytes)

    def _count_embedding(self, nbytes: int) -> None:
        self._embedding_bytes += nbytes
        most = self.max_embedding_bytes
        if most is not None and self._embedding_bytes > most:
            raise TooLarge(
                f"the request's embeddings are larger than {most >> 20} MiB: send its items in several requests"
            )

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline; not negative."""
        return max(0.0, self.deadline - time.monotonic())
