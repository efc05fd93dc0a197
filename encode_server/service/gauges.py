"""What the gauges of `/metrics` say: everything that is bounded, beside its bound; what waits; what lives."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the server calls this module
    from encode_server.service.encoding import Encoding
    from encode_server.service.server import Server


def show_gauges(server: Server) -> None:
    """Bring the gauges up to date. Called when somebody looks: between two looks nobody pays for them."""
    metrics, settings = server.metrics, server.settings
    held, limits = server.admission.held, server.admission.limits
    metrics.requests_held.show(held.requests, limits.max_requests)
    metrics.bytes_held.show(held.bytes, limits.max_bytes)
    metrics.tokens_held.show(held.tokens, limits.max_tokens)
    metrics.undelivered_held.show(server.undelivered.bytes, server.undelivered.max_bytes)
    metrics.arena_held.show(server.arena.used, server.arena.size)
    if (folder := server.folder) is not None:
        metrics.store_held.show(folder.used_bytes, folder.max_bytes)
    if (shared := server.shared) is not None:
        metrics.shared_queued.show(shared.queued_bytes, shared.max_queued_bytes)
        metrics.shared_up["get"].set(shared.asking)
        metrics.shared_up["put"].set(shared.writing)
    for pool, room in server.outgoing.items():
        metrics.pool_held[pool].show(room.used_bytes, room.max_bytes)
    metrics.at_door.set(server.admission.waiting)
    metrics.registrations.set(len(server.sglang.registrations) if server.sglang else 0)
    metrics.ready.set(server.unavailable() is None)
    if server.encoding is not None:
        _show_encoding(server, server.encoding)
    else:
        for group in range(settings.dp):
            metrics.show_ranks(group, [False] * settings.tp)


def _show_encoding(server: Server, encoding: Encoding) -> None:
    metrics, engine, preparers, batcher = server.metrics, encoding.engine, encoding.preparers, encoding.batcher
    metrics.cache_held.show(encoding.cache.bytes, encoding.cache.max_bytes)
    metrics.threads_held.show(preparers.threads_busy, preparers.threads)
    metrics.preparing_queued.set(preparers.queued)
    metrics.queued.set(batcher.queued)
    load = server.load()
    metrics.backlog.set(load.backlog_s)
    metrics.capacity.set(load.capacity or 0.0)
    metrics.in_flight.set(batcher.in_flight)
    slowest = engine.slowest
    metrics.forward_age.set(slowest.forward_age_s() or 0.0)
    metrics.forward_limit.set(slowest.limit_s())
    for index, (group, work) in enumerate(zip(engine.groups, batcher.works, strict=True)):
        metrics.show_ranks(index, [state == "ready" for state in group.rank_states] or [False] * server.settings.tp)
        metrics.group_up[str(index)].set(group.ready)
        metrics.group_in_flight[str(index)].set(len(work.running))
        metrics.group_backlog[str(index)].set(work.seconds)
    metrics.show_device_memory(
        (index, rank, memory)
        for index, group in enumerate(engine.groups)
        for rank, memory in enumerate(group.rank_memory)
        if memory is not None
    )
    metrics.show_preparers(state != "starting" for state in preparers.states)
    for modality, cost in batcher.costs.items():
        metrics.speed[modality].set(cost.patches_per_s or 0.0)
        metrics.patches_per_pair[modality].set(cost.patches_per_pair)
