"""How much work a server has, as its answers and its `/health` say."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

BACKLOG_HEADER = "X-Encode-Backlog-S"
CAPACITY_HEADER = "X-Encode-Capacity"
COST_HEADER = "X-Encode-Item-Tokens"

CONTENT_HEADER = "X-Encode-Content-Hash"  # of a request: what a balancer chooses an encoder by


class Load(msgspec.Struct, frozen=True):
    """`backlog_s`: seconds until what the server holds is encoded. `capacity`: encoder tokens (patches, mel frames)
    that the server encodes in a second, None before the server has learnt."""

    backlog_s: float
    capacity: float | None = None


def load_headers(load: Load) -> dict[str, str]:
    """The headers of an answer."""
    headers = {BACKLOG_HEADER: f"{load.backlog_s:.4f}"}
    if load.capacity is not None:
        headers[CAPACITY_HEADER] = f"{load.capacity:.1f}"
    return headers


def load_from(headers: Mapping[str, str]) -> Load | None:
    """What an answer's headers say, None where they say nothing that can be read."""
    try:
        backlog_s, capacity = float(headers[BACKLOG_HEADER]), headers.get(CAPACITY_HEADER)
        return Load(max(0.0, backlog_s), float(capacity) if capacity else None)
    except (KeyError, ValueError):
        return None


def cost_from(headers: Mapping[str, str]) -> int | None:
    """Encoder tokens that an item of the request cost the server, on average; None where the answer does not say."""
    value = headers.get(COST_HEADER, "")
    return int(value) if value.isascii() and value.isdigit() and len(value) < 12 else None
