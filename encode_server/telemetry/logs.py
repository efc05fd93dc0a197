"""Logging set-up, and the one line each request leaves."""

from __future__ import annotations

import json
import logging
from typing import Any

MAX_QUOTED = 200
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    code: f"\\u{code:04x}" for code in (0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}

request_log = logging.getLogger("encode_server.requests")


def configure(level: str) -> None:
    """Send the server's log to standard error in one format; uvicorn's access log is off, ours says more."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    for noisy in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def quoted(text: str) -> str:
    """A string of a stranger for a log line: nothing in it begins a line, moves a cursor, or looks like a field of
    ours."""
    if text.isascii() and text.isprintable() and not set(text) & {" ", '"', "="}:
        return text
    return json.dumps(text[:MAX_QUOTED])


class OneLine(logging.Formatter):
    """Writes control characters of a message as escapes, wherever the message has them from."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`; tracebacks are appended later, and keep their lines."""
        return super().formatMessage(record).translate(_CONTROLS)

    def formatException(self, ei: Any) -> str:
        """See `logging.Formatter`. Indented: a line in an error's message looks like no line of the log."""
        return "\n".join("  | " + line.translate(_CONTROLS) for line in super().formatException(ei).split("\n"))


def log_request(req_id: str, modality: str, outcome: str, items: int, tokens: int, stages: dict[str, float]) -> None:
    """`req=… modality=… outcome=… items=… tokens=… fetch=1.2ms …`."""
    times = " ".join(f"{name}={seconds * 1000:.1f}ms" for name, seconds in stages.items())
    request_log.info(
        "req=%s modality=%s outcome=%s items=%d tokens=%d %s", quoted(req_id), modality, outcome, items, tokens, times
    )
