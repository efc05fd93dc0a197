"""What is kept of a request after its end: a line in the log, its part in the metrics and in the history."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field

from encode_server.errors import EncodeError
from encode_server.telemetry.history import History
from encode_server.telemetry.ids import current_ids
from encode_server.telemetry.logs import log_request
from encode_server.telemetry.metrics import UNKNOWN, Metrics

BROKEN = frozenset({500, 503, 504})
"""Statuses of failures that are the server's own: not the caller's, and not those of a destination or a full store."""


@dataclass
class Record:
    """What the request's log line, metrics and history say in the end. `stages`: seconds by stage, `total` among them.
    `target`: where its embedding was pushed or stored, None where it was not. `message`, `bound`, `broken`: of the
    error, see `History.end_request`."""

    req_id: str | None = None
    modality: str = UNKNOWN
    destination: str = UNKNOWN
    items: int = 0
    tokens: int = 0
    target: str | None = None
    message: str = ""
    bound: str | None = None
    broken: bool = False
    stages: dict[str, float] = field(default_factory=dict)

    def fail(self, error: EncodeError) -> None:
        """Note why the request came to nothing."""
        self.message, self.bound, self.broken = error.message, error.bound, error.status in BROKEN


def note_end(metrics: Metrics, history: History, record: Record, outcome: str) -> None:
    """Count, remember and log a request that has ended. Its trace, where somebody records it, goes with its
    duration."""
    ids = current_ids()
    trace_id = ids.trace_id if ids is not None and ids.sampled else None
    metrics.end_request(record.modality, outcome, record.destination, record.stages["total"], trace_id)
    history.end_request(
        request_id=ids.request_id if ids is not None else "",
        req_id=record.req_id or "",
        modality=record.modality,
        destination=record.destination,
        outcome=outcome,
        items=record.items,
        tokens=record.tokens,
        stages=record.stages,
        message=record.message,
        target=record.target,
        bound=record.bound,
        broken=record.broken,
    )
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
