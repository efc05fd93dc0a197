"""One request's parts on their way to becoming its embedding."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import zmq

from encode_server.client.embedding import Embedding, check_size, join
from encode_server.client.errors import EncodeServerError, ProtocolError
from encode_server.wire.dtypes import ITEM_BYTES
from encode_server.wire.frames import MEMORY_VERSION, VERSION, EmbeddingHeader, decode_header

MAX_HEADER_BYTES = 4 << 20
MAX_PARTS = 4096
# What a part costs beside its bytes: without it a flood of empty parts would count as nothing.
PART_OVERHEAD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Part:
    """One received part, or the error in its place. `data` views the memory of the ZMQ message."""

    header: EmbeddingHeader
    data: memoryview
    cost: int

    @property
    def nbytes(self) -> int:
        """Of the embedding, also where its bytes are elsewhere."""
        tokens, dim = self.header.shape
        return tokens * dim * ITEM_BYTES.get(self.header.dtype, 0)


def read_part(frames: list[zmq.Frame], *, remote: bool = False) -> Part:
    """The part in a message's frames. `remote`: it may be one whose bytes are elsewhere, see `header.memory`; they are
    not read here. Raises `ProtocolError` for anything that isn't one."""
    if len(frames[0]) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(frames[0])} bytes")
    try:
        header = decode_header(frames[0].buffer)
    except (ValueError, RecursionError) as exc:
        raise ProtocolError(f"not an embedding's header: {exc}") from exc
    if header.version > (newest := VERSION if header.memory is None else MEMORY_VERSION):
        raise ProtocolError(f"frames of version {header.version}, this client reads version {newest}: update it")
    if not (0 < header.num_parts <= MAX_PARTS and 0 <= header.part_idx < header.num_parts):
        raise ProtocolError(f"part {header.part_idx} of {header.num_parts}")
    cost = sum(len(frame) for frame in frames) + PART_OVERHEAD_BYTES
    if header.error is not None:
        return Part(header, memoryview(b""), cost)
    if header.memory is not None:
        return _remote_part(header, cost, remote)
    if len(frames) != 2:
        raise ProtocolError(f"{len(frames)} frames where a header and an embedding were expected")
    check_size(header.dtype, header.shape, len(frames[1]))
    return Part(header, frames[1].buffer, cost)


def _remote_part(header: EmbeddingHeader, cost: int, remote: bool) -> Part:
    if not remote:
        raise ProtocolError("an embedding to be read by NIXL, which this receiver does not do")
    part = Part(header, memoryview(b""), cost)
    check_size(header.dtype, header.shape, part.nbytes)
    return Part(header, part.data, cost + part.nbytes)


@dataclass(slots=True)
class Assembly:
    """The parts of one request that have come so far. `settled` is set once nothing more need come."""

    req_id: str
    parts: dict[int, Part] = field(default_factory=dict)
    num_parts: int = 0
    failure: Exception | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def cost(self) -> int:
        """Bytes of memory the parts hold."""
        return sum(part.cost for part in self.parts.values())

    def add(self, part: Part) -> bool:
        """Takes a part in; False for one that is here already. Raises `ProtocolError` if it contradicts the others."""
        header = part.header
        if header.part_idx in self.parts:
            return False
        if self.parts and header.num_parts != self.num_parts:
            raise ProtocolError(f"a part of {header.num_parts} where the others are of {self.num_parts}")
        self.num_parts = header.num_parts
        self.parts[header.part_idx] = part
        if header.error is not None:
            error = header.error
            self.fail(EncodeServerError(error.status, error.code, error.message, req_id=self.req_id))
        elif len(self.parts) == self.num_parts:
            self.settled.set()
        return True

    def fail(self, failure: Exception) -> None:
        """Settles the request with an error, unless it is settled already."""
        if not self.settled.is_set():
            self.failure = failure
            self.settled.set()

    async def embedding(self) -> Embedding:
        """The parts' rows in the order of `part_idx`: one part as it came, several joined by one copy in a thread.

        Raises what settled the request, or `ProtocolError` when the parts differ in model, modality, dtype or dim.
        """
        if self.failure is not None:
            raise self.failure
        parts = [self.parts[i] for i in range(self.num_parts)]
        first = parts[0].header
        if len({(h.model, h.modality, h.dtype, h.shape[1]) for h in (part.header for part in parts)}) > 1:
            raise ProtocolError(f"the parts of {self.req_id!r} differ in model, modality, dtype or dim")
        data = parts[0].data if len(parts) == 1 else await asyncio.to_thread(join, [part.data for part in parts])
        return Embedding(
            req_id=self.req_id,
            model=first.model,
            modality=first.modality,
            dtype=first.dtype,
            shape=(sum(part.header.shape[0] for part in parts), first.shape[1]),
            items=tuple(item for part in parts for item in part.header.items),
            data=data,
        )
