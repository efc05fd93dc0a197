"""Logging set-up, and the one line each request leaves."""

from __future__ import annotations

import logging

request_log = logging.getLogger("encode_server.requests")


def configure(level: str) -> None:
    """Send the server's log to standard error in one format; uvicorn's access log is off, ours says more."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=[logging.StreamHandler()],
    )
    for noisy in ("httpx", "httpcore", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_request(req_id: str, modality: str, outcome: str, items: int, tokens: int, stages: dict[str, float]) -> None:
    """`req=… modality=… outcome=… items=… tokens=… fetch=1.2ms …`."""
    times = " ".join(f"{name}={seconds * 1000:.1f}ms" for name, seconds in stages.items())
    request_log.info(
        "req=%s modality=%s outcome=%s items=%d tokens=%d %s", req_id, modality, outcome, items, tokens, times
    )
