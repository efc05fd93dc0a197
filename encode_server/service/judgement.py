"""How a server is, in one word and a reason, judged each second from what it knows without encoding anything."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from encode_server.engine.supervisor import EngineState

if TYPE_CHECKING:  # the server calls this module
    from encode_server.service.encoding import Encoding
    from encode_server.service.server import Server

INTERVAL_S = 1.0
FAILING = 0.02  # share of the last minute's requests that failed for the server's reasons, from which it is said
OLD_S = 2.0  # a forward is worth mentioning from this age on, if half of its time is up


async def keep_watch(server: Server) -> None:
    """Judge the server and note what it holds, each second, until cancelled."""
    while True:
        observe(server)
        await asyncio.sleep(INTERVAL_S)


def observe(server: Server) -> None:
    """Judge the server, and note what it holds."""
    level, reason = judge(server)
    server.history.judge(level, reason)
    waiting = server.admission.waiting
    if (encoding := server.encoding) is not None:
        waiting += encoding.batcher.queued + encoding.preparers.queued
    server.history.sample(server.admission.held.requests, waiting, server.load().backlog_s)


def judge(server: Server) -> tuple[str, str]:
    """The level, see `telemetry.history.Verdict`, and why."""
    reason = server.unavailable()
    if server.leaving:
        return "leaving", reason or ""
    if server.fatal is not None:
        return "down", server.fatal
    encoding = server.encoding
    if encoding is None:
        return "starting", reason or ""
    if encoding.engine.state is EngineState.RESTARTING:
        return "impaired", f"the ranks are started again: {encoding.engine.reason}"
    if reason is not None:
        return "starting", reason
    if refusing := server.history.refusing():
        return "full", f"requests are refused: {'; '.join(_plain(server, bound) for bound in sorted(refusing))}"
    if (trouble := _trouble(encoding)) is not None:
        return "impaired", trouble
    ended, broken = server.history.last_minute()
    if broken > FAILING * ended:
        return "impaired", f"{broken} of {ended} requests failed in the last minute, for reasons of the server's"
    held = server.admission.held.requests
    return "well", f"{held} {'request' if held == 1 else 'requests'} in progress" if held else "requests are taken"


def _trouble(encoding: Encoding) -> str | None:
    lost = [index for index, state in enumerate(encoding.preparers.states) if state == "starting"]
    if lost:
        return f"preparer {', '.join(map(str, lost))} is being started"
    groups = encoding.engine.groups
    out = [str(index) for index, group in enumerate(groups) if not group.ready]
    if out:
        return f"group {', '.join(out)} of {len(groups)} does not work: {groups[int(out[0])].reason}"
    slowest = encoding.engine.slowest
    age, limit = slowest.forward_age_s(), slowest.limit_s()
    if age is not None and age > max(OLD_S, limit / 2):
        return f"a forward has taken {age:.0f} s; at {limit:.0f} s the ranks count as hanging"
    return None


def _plain(server: Server, bound: str) -> str:
    """Which bound it is that refuses, for a person."""
    limits = server.admission.limits
    return {
        "requests": f"at most {limits.max_requests} may be in progress",
        "bytes": f"their media may have {limits.max_bytes >> 20} MiB",
        "tokens": f"they may have {limits.max_tokens} patches and mel frames",
        "client_share": f"one client may hold {limits.client_share:.0%} beside others",
        "undelivered": f"embeddings on their way may have {server.undelivered.max_bytes >> 20} MiB",
        "store": "the embedding store is full",
    }.get(bound, bound)
