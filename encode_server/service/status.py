"""`GET /status`: what a person on call wants to see, as one document. The page at `/` shows it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from encode_server import __version__
from encode_server.runtime.cores import usable_cores
from encode_server.runtime.losses import Losses
from encode_server.service.judgement import observe
from encode_server.settings import option_name
from encode_server.telemetry.history import Ended, Failure, StageTimes, Target, Timeline, Verdict
from encode_server.wire.ranks import DeviceMemory

if TYPE_CHECKING:  # the server's type only
    from encode_server.service.server import Server


class Process(msgspec.Struct, frozen=True):
    """A rank or a preparer. `name`: its number, for a rank of several groups after the group's and a dot. The ranks of
    a group are lost together, so they show the losses of their group. `memory`: of a rank's device, see
    `wire.ranks.DeviceMemory`; None on a CPU, and until the rank has said so."""

    name: str
    state: str
    pid: int | None
    losses: Losses
    memory: DeviceMemory | None = None


class Level(msgspec.Struct, frozen=True):
    """Something that is bounded: how much of it is used, and the bound, 0 for none. `unit`: `bytes`, `s` or empty.
    `option`: what sets the bound. `refusals`: requests that the bound has refused; `refusing`: within the last 10 s."""

    name: str
    used: float
    limit: float
    unit: str
    option: str
    refusals: int = 0
    refusing: bool = False


class Waiting(msgspec.Struct, frozen=True):
    """What waits: requests at the door, items for a preparer and for a batch; batches sent to the ranks. `backlog_s`:
    seconds until all that is done."""

    at_door: int
    preparations: int
    items: int
    batches: int
    backlog_s: float


class Capacity(msgspec.Struct, frozen=True):
    """What the server works with, for whoever plans more of them. `at_once`, `computing`: forwards of a group,
    of `dp` groups, in progress and computed concurrently. `batch_cost`, `budgets`: patches and mel frames of a batch,
    see `wire.ranks.EncoderInfo` and the options. `costs`: seconds of a forward as such, of a patch, of a pair of
    patches, by modality; None until learnt."""

    cores: int
    tp: int
    dp: int
    preparer_threads: int
    at_once: int
    computing: int
    batch_cost: int | None
    budgets: dict[str, int]
    costs: dict[str, tuple[float, float, float] | None]


class Status(msgspec.Struct, frozen=True):
    """A server, and its last quarter of an hour. `now` and `started_at`: Unix time. `modalities` is empty, `dtype` and
    `device`, `capacity` are None until the encoder is loaded."""

    version: str
    model: str
    modalities: list[str]
    dtype: str | None
    device: str | None
    protocol: str
    started_at: float
    now: float
    verdict: Verdict
    ranks: list[Process]
    preparers: list[Process]
    levels: list[Level]
    waiting: Waiting
    capacity: Capacity | None
    stages: list[StageTimes]
    timeline: Timeline
    failures: list[Failure]
    slowest: list[Ended]
    destinations: list[Target]


def status(server: Server) -> Status:
    """The document, as of now. Costs less than a millisecond."""
    observe(server)
    history, encoding = server.history, server.encoding
    info = encoding.engine.info if encoding is not None else None
    return Status(
        version=__version__,
        model=encoding.model_name if encoding is not None else server.model_name,
        modalities=sorted(encoding.pipeline.modalities) if encoding is not None else [],
        dtype=info.dtype if info is not None else None,
        device=info.device if info is not None else None,
        protocol=server.settings.protocol,
        started_at=server.started_at,
        now=time.time(),
        verdict=history.verdict,
        ranks=_ranks(server),
        preparers=_preparers(server),
        levels=list(_levels(server)),
        waiting=Waiting(
            at_door=server.admission.waiting,
            preparations=encoding.preparers.queued if encoding is not None else 0,
            items=encoding.batcher.queued if encoding is not None else 0,
            batches=encoding.batcher.in_flight if encoding is not None else 0,
            backlog_s=round(server.load().backlog_s, 3),
        ),
        capacity=_capacity(server),
        stages=history.stages(),
        timeline=history.timeline(),
        failures=history.failures(),
        slowest=history.slowest(),
        destinations=history.failing(),
    )


def _ranks(server: Server) -> list[Process]:
    tp, dp = server.settings.tp, server.settings.dp
    groups = server.encoding.engine.groups if server.encoding is not None else [None] * dp
    found = []
    for number, group in enumerate(groups):
        states = (group and group.rank_states) or ["waiting"] * tp
        pids = (group and group.rank_pids) or [None] * tp
        memory = (group and group.rank_memory) or [None] * tp
        losses = group.losses if group is not None else Losses()
        for rank, (state, pid, used) in enumerate(zip(states, pids, memory, strict=True)):
            found.append(Process(f"{number}.{rank}" if dp > 1 else str(rank), state, pid, losses, used))
    return found


def _preparers(server: Server) -> list[Process]:
    if server.encoding is None:
        return []
    preparers = server.encoding.preparers
    found = zip(preparers.states, preparers.pids, preparers.losses, strict=True)
    return [Process(str(index), state, pid, losses) for index, (state, pid, losses) in enumerate(found)]


def _capacity(server: Server) -> Capacity | None:
    if (encoding := server.encoding) is None or (info := encoding.engine.info) is None:
        return None
    costs = encoding.batcher.costs
    return Capacity(
        cores=usable_cores(),
        tp=server.settings.tp,
        dp=server.settings.dp,
        preparer_threads=encoding.preparers.threads,
        at_once=info.at_once,
        computing=info.computing,
        batch_cost=info.batch_cost,
        budgets={str(modality): encoding.batcher.budget(modality) for modality in costs},
        costs={str(modality): cost.parts for modality, cost in costs.items()},
    )


def _levels(server: Server) -> Iterable[Level]:
    history, held, limits = server.history, server.admission.held, server.admission.limits
    refusing = history.refusing()

    def level(name: str, used: float, limit: float, unit: str, setting: str, bound: str = "") -> Level:
        option = option_name(setting) if setting else ""
        return Level(name, used, limit, unit, option, history.refusals[bound] if bound else 0, bound in refusing)

    yield level("requests in progress", held.requests, limits.max_requests, "", "max_requests", "requests")
    yield level("their media", held.bytes, limits.max_bytes, "bytes", "max_inflight_mb", "bytes")
    yield level("their patches, mel frames", held.tokens, limits.max_tokens, "", "max_inflight_tokens", "tokens")
    share = max(1, int(limits.max_requests * limits.client_share))
    most = server.admission.most_of_one_client
    yield level("requests of one client", most, share, "", "client_share", "client_share")
    undelivered = server.undelivered
    yield level(
        "embeddings on their way", undelivered.bytes, undelivered.max_bytes, "bytes", "undelivered_mb", "undelivered"
    )
    yield level("arena", server.arena.used, server.arena.size, "bytes", "arena_mb")
    if (encoding := server.encoding) is not None:
        preparers, slowest = encoding.preparers, encoding.engine.slowest
        yield level("preparers' threads", preparers.threads_busy, preparers.threads, "", "preproc_workers")
        yield level("oldest forward", slowest.forward_age_s() or 0.0, slowest.limit_s(), "s", "stall_s")
        yield level("cache", encoding.cache.bytes, encoding.cache.max_bytes, "bytes", "cache_gb")
    for pool, room in server.outgoing.items():
        yield level(f"memory registered with {pool}", room.used_bytes, room.max_bytes, "bytes", f"{pool}_pool_mb")
    if (folder := server.folder) is not None:
        yield level("embedding store", folder.used_bytes, folder.max_bytes, "bytes", "ec_store_gb", "store")
