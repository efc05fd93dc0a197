"""What exists once the checkpoint is known: everything between a request and its embedding, and what it is made of."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from encode_server.engine.arena import Arena
from encode_server.engine.groups import RankGroups
from encode_server.engine.supervisor import SupervisorOptions
from encode_server.errors import StartupError
from encode_server.media.sources import MediaSource
from encode_server.pipeline.batcher import Batcher
from encode_server.pipeline.cache import EmbeddingCache
from encode_server.pipeline.health import HealthProbe
from encode_server.pipeline.pipeline import Pipeline, Route
from encode_server.pipeline.shared.cache import SharedCache
from encode_server.prepare.preparers import Preparers
from encode_server.runtime.forkserver import Forkserver, ForkserverLost
from encode_server.runtime.pools import Pools
from encode_server.service.options import batch_tokens, group_spec, preparer_spec
from encode_server.settings import Settings
from encode_server.telemetry.metrics import Metrics
from encode_server.telemetry.tracing import Tracing
from encode_server.wire.checkpoint import Inspection

log = logging.getLogger(__name__)

FORKSERVER_TRIES = 3


@dataclass(frozen=True)
class Encoding:
    """The rooms that a request goes through. Whoever builds them runs `engine`, `preparers` and `batcher`."""

    model_name: str
    engine: RankGroups
    preparers: Preparers
    batcher: Batcher
    pipeline: Pipeline
    cache: EmbeddingCache
    health: HealthProbe
    route: Route


def build(
    found: Inspection,
    forkserver: Forkserver,
    *,
    name: str,
    settings: Settings,
    arena: Arena,
    source: MediaSource,
    pools: Pools,
    metrics: Metrics,
    tracing: Tracing | None,
    shared: SharedCache | None,
) -> Encoding:
    """Make the rooms. No process is started before they run. `name`: the model's, in answers."""

    async def prove(group: int) -> str:
        return await health.prove(group)

    for note in found.notes:
        log.warning("%s", note)
    options = SupervisorOptions(settings.stall_s, settings.load_timeout_s, restarts=settings.max_restarts)
    engine = RankGroups(group_spec(settings, found), forkserver, arena, options, metrics, prove)
    preparers = Preparers(preparer_spec(settings, found, arena.size), forkserver, arena.fd, metrics)
    batcher = Batcher(engine, batch_tokens(settings), metrics, tracing)
    cache = EmbeddingCache(int(settings.cache_gb * (1 << 30)), metrics)
    pipeline = Pipeline(
        model=name,
        modalities=frozenset(found.modalities),
        source=source,
        pools=pools,
        preparers=preparers,
        arena=arena,
        engine=engine,
        batcher=batcher,
        max_item_tokens=settings.max_item_tokens,
    )
    health = HealthProbe(pipeline, engine, preparers, batcher, found.probes, settings.stall_s)
    route = Route(cache, metrics, tracing, shared, trusting=settings.trust_content_hash)
    return Encoding(name, engine, preparers, batcher, pipeline, cache, health, route)


async def inspect_checkpoint(forkserver: Forkserver, settings: Settings) -> Inspection:
    """What the checkpoint is, found out in a process of its own. Raises StartupError."""
    arguments = [settings.model, settings.revision, settings.tp]
    for attempt in range(FORKSERVER_TRIES):
        try:
            found = await forkserver.call("encode_server.models.inspect:inspect", arguments, Inspection)
            assert isinstance(found, Inspection)
            return found
        except ForkserverLost:
            log.warning("the forkserver was lost while the checkpoint was looked up (%d)", attempt + 1)
    raise StartupError("the process that forks ranks and preparers does not live long enough to fork")


async def take_fingerprint(shared: SharedCache, forkserver: Forkserver, settings: Settings, path: str) -> None:
    """Find out which other servers' embeddings are as good as this one's. Until then the shared cache rests. `path`: of
    the checkpoint."""
    # Options that change embeddings beyond a rounding, and are the same for all requests.
    options = {"image_alpha": settings.image_alpha, "tf32": settings.tf32}
    arguments = [path, options]
    for _ in range(FORKSERVER_TRIES):
        try:
            found = await forkserver.call("encode_server.models.fingerprint:fingerprint", arguments, str)
            shared.fingerprint = found
            log.info("the shared cache is used for embeddings of %s", found[:16])
            return
        except ForkserverLost:
            continue
        except StartupError as error:  # the server is of use without it
            log.warning("the shared cache is not used: %s", error)
            return
    log.warning("the shared cache is not used: the process that reads the checkpoint does not live long enough")
