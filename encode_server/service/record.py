"""What is kept of a request after its end: a line in the log, and its part in the metrics."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from encode_server.telemetry.ids import current_ids
from encode_server.telemetry.logs import log_request
from encode_server.telemetry.metrics import UNKNOWN, Metrics


@dataclass
class Record:
    """What the request's log line and metrics say in the end. `stages`: seconds by stage, `total` among them."""

    req_id: str | None = None
    modality: str = UNKNOWN
    destination: str = UNKNOWN
    items: int = 0
    tokens: int = 0
    stages: dict[str, float] = field(default_factory=dict)


def note_end(metrics: Metrics, record: Record, outcome: str) -> None:
    """Count and log a request that has ended. Its trace, where somebody records it, goes with its duration."""
    ids = current_ids()
    trace_id = ids.trace_id if ids is not None and ids.sampled else None
    metrics.end_request(record.modality, outcome, record.destination, record.stages["total"], trace_id)
    log_request(
        record.req_id or "-",
        record.modality,
        record.destination,
        outcome,
        record.items,
        record.tokens,
        record.stages,
    )


def new_req_id() -> str:
    """A name for a request whose body has none. Not the caller's `X-Request-ID`: several requests may share that id,
    and a part of a request is delivered once."""
    ids = current_ids()
    return uuid.uuid4().hex if ids is None or ids.given else ids.request_id
