"""Logging set-up, as text or as JSON, and the one line each request leaves.

Every line that is written on a request's way names the request and its trace. No line holds media, keys, or the query
of a URL. Control characters are escaped: what a stranger sends cannot look like a line of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any, Literal

from encode_server.telemetry.ids import current_ids

LogFormat = Literal["text", "json"]

request_log = logging.getLogger("encode_server.requests")

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MAX_QUOTED = 200
# C0 and C1 controls, DEL, the separators at which some viewers break lines, and what turns the direction of text.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}


def configure(level: str, log_format: LogFormat = "text") -> None:
    """Send the server's log to standard error in one format; uvicorn's access log is off, ours says more."""
    handler = logging.StreamHandler()
    handler.addFilter(_name_request)
    handler.setFormatter(TextFormatter() if log_format == "text" else _json_formatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_request(
    req_id: str, modality: str, destination: str, outcome: str, items: int, tokens: int, stages: Mapping[str, float]
) -> None:
    """`req=… modality=… destination=… outcome=… items=… tokens=… fetch=1.2ms …`; as JSON, an object `request` with
    these fields. `stages`: seconds by stage, logged in milliseconds."""
    if not request_log.isEnabledFor(logging.INFO):
        return
    fields = {
        "req": req_id,
        "modality": modality,
        "destination": destination,
        "outcome": outcome,
        "items": items,
        "tokens": tokens,
        "ms": {name: round(seconds * 1000, 1) for name, seconds in stages.items()},
    }
    request_log.info("request", extra={"request": fields})


class TextFormatter(logging.Formatter):
    """A line for each record, the request's ids at its end; the lines of a traceback follow, indented."""

    def __init__(self) -> None:
        super().__init__(TEXT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See logging."""
        if (fields := getattr(record, "request", None)) is not None:
            record.message = _words(fields)
        line = super().formatMessage(record).translate(_CONTROLS)
        request_id, trace_id = getattr(record, "request_id", None), getattr(record, "trace_id", None)
        if request_id is not None and request_id not in line:
            line += f" id={request_id}"
        return line if trace_id is None else f"{line} trace={trace_id}"

    def formatException(self, ei: Any) -> str:
        """See logging."""
        return "\n".join("  | " + line.translate(_CONTROLS) for line in super().formatException(ei).split("\n"))


def quoted(text: str) -> str:
    """A string of a stranger for a log line: nothing in it begins a line, moves a cursor, or looks like a field of
    ours."""
    if text.isascii() and text.isprintable() and not set(text) & {" ", '"', "="}:
        return text
    return json.dumps(text[:MAX_QUOTED])


def _words(fields: Mapping[str, Any]) -> str:
    words = [f"{name}={quoted(str(value))}" for name, value in fields.items() if name != "ms"]
    return " ".join(words + [f"{stage}={value:.1f}ms" for stage, value in fields["ms"].items()])


def _name_request(record: logging.LogRecord) -> bool:
    """Add the ids of the request on whose way the record was made."""
    if (ids := current_ids()) is not None:
        record.request_id = ids.request_id
        if ids.trace_id is not None:
            record.trace_id = ids.trace_id
    return True


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    names = {"levelname": "level", "name": "logger", "exc_info": "traceback"}
    return JsonFormatter(["levelname", "name", "message"], rename_fields=names, timestamp="time")
