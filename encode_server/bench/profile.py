"""What one request of each kind costs a server, measured alone: what `encode-server plan` begins with."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from typing import Any

from encode_server.bench.client import LoadClient
from encode_server.bench.mix import Mix
from encode_server.bench.source import LoadRequest, of_kind
from encode_server.errors import StartupError
from encode_server.wire.load import COST_HEADER

TRIES = 7  # of each kind, one after the other; the first two warm up
WARM = 2


async def profile(client: LoadClient, mix: Mix) -> list[dict[str, Any]]:
    """Per kind: `patches` (or mel frames) and `tokens` of an item, bytes of a request, and the median seconds of each
    stage and of all, of a request that is alone. Raises StartupError when a request fails."""
    found = []
    for share in mix.shares:
        answers = [await _timed(client, request) for request in _first(of_kind(share.media, 1), TRIES)][WARM:]
        stages = {
            name: statistics.median(answer["stages"].get(name, 0.0) for answer in answers)
            for name in ("fetch", "preprocess", "copy", "queue", "forward")
        }
        found.append(
            {
                "media": share.media,
                "modality": answers[0]["modality"],
                "patches": answers[-1]["patches"],
                "tokens": answers[-1]["tokens"],
                "bytes": answers[-1]["bytes"],
                "answer_bytes": answers[-1]["answer_bytes"],
                "stages_s": stages,
                "total_s": statistics.median(answer["seconds"] for answer in answers),
            }
        )
    return found


def _first(requests: Iterator[LoadRequest], count: int) -> list[LoadRequest]:
    return [next(requests) for _ in range(count)]


async def _timed(client: LoadClient, request: LoadRequest) -> dict[str, Any]:
    response, seconds = await client.send(request)
    if response.status != 200:
        why = response.error or response.body[:200].decode("utf-8", "replace")
        raise StartupError(f"a request of {request.kind} failed while costs were measured: {response.status} {why}")
    timing = response.headers.get("server-timing", "")
    stages = {name: float(ms) / 1e3 for name, ms in re.findall(r"([\w-]+);dur=([\d.]+)", timing)}
    return {
        "modality": request.modality,
        "patches": int(response.headers.get(COST_HEADER.lower(), 0)),
        "tokens": next(iter(response.shape), 0),
        "bytes": sum(map(len, request.pieces)),
        "answer_bytes": response.size,
        "stages": stages,
        "seconds": seconds,
    }


async def server_status(client: LoadClient) -> dict[str, Any] | None:
    """What the server says of itself in `/status`; None where it is another server, or has none."""
    response, _ = await client.send(LoadRequest("status", "status", (), path="/status", method="GET"))
    try:
        document = json.loads(response.body) if response.status == 200 else None
    except ValueError:
        return None
    return document if isinstance(document, dict) and "levels" in document else None
