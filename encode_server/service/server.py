"""One running server: the rooms wired together, started and stopped in order."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Callable

from encode_server.api.keys import ApiKeys
from encode_server.delivery.active import ActiveParts
from encode_server.delivery.destinations import DestinationPolicy
from encode_server.delivery.folder import EntryFolder
from encode_server.delivery.push import Pusher
from encode_server.delivery.sglang.announcer import Announcer, advertised_host
from encode_server.delivery.sglang.deliveries import SGLangDeliveries
from encode_server.delivery.sglang.frames import SGLangFrames
from encode_server.delivery.store import EmbeddingStore
from encode_server.delivery.undelivered import Undelivered
from encode_server.engine.arena import Arena
from encode_server.engine.group import GroupSpec
from encode_server.engine.profiling import Profiling
from encode_server.engine.supervisor import Supervisor, SupervisorOptions
from encode_server.errors import StartupError
from encode_server.media.limits import MediaLimits
from encode_server.media.policy import UrlPolicy
from encode_server.media.sources import MediaSource
from encode_server.models.checkpoint import Checkpoint, resolve
from encode_server.models.registry import Summary, check_tp, summarize
from encode_server.pipeline.admission import Admission, AdmissionLimits
from encode_server.pipeline.batcher import Batcher
from encode_server.pipeline.cache import EmbeddingCache
from encode_server.pipeline.health import HealthProbe, Verdict
from encode_server.pipeline.pipeline import Pipeline
from encode_server.runtime.pools import Pools, run
from encode_server.runtime.rundir import sweep_stale
from encode_server.settings import Settings
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.modality import Modality

log = logging.getLogger(__name__)

LAG_INTERVAL_S = 0.1


class Server:
    """What lives while the server does. Build it outside the loop, `start` and `stop` it on the loop.

    Raises StartupError when the settings cannot work: unknown model, tp that does not divide the heads, …
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._checkpoint: Checkpoint = resolve(settings.model, settings.revision)
        summary: Summary = summarize(self._checkpoint)
        check_tp(summary, settings.tp)
        self.model_name = self._checkpoint.name
        self._limits = media_limits(settings)
        self.metrics = Metrics()
        self.pools = Pools(settings.preproc_workers, settings.send_workers)
        self._source = _media_source(settings, self._limits, self.pools)
        self.destinations = DestinationPolicy(settings.destination_allow)
        self.store = _embedding_store(settings, self.pools)
        self.active = ActiveParts()
        self.undelivered = Undelivered(settings.undelivered_mb << 20)
        self._profiling = Profiling(settings.profile_dir)
        self._announcer = Announcer(
            settings.register_url,
            "https" if settings.ssl_certfile else "http",
            advertised_host(settings.advertise_host, settings.host),
            lambda: self.not_ready() is None,
        )
        self.port = settings.port  # whoever binds the socket corrects it
        limits = AdmissionLimits(
            settings.max_requests, settings.max_inflight_mb << 20, settings.max_inflight_tokens, settings.client_share
        )
        self.admission = Admission(limits, self.metrics)
        self.keys = ApiKeys(settings.api_keys)
        self._spec = GroupSpec(
            path=str(self._checkpoint.path),
            world=settings.tp,
            device=settings.device,
            dtype=settings.dtype,
            checkpoint_dtype=summary.dtype,
            threads=settings.rank_threads or max(1, (os.cpu_count() or 1) // settings.tp),
        )
        self.fatal: str | None = None
        self.pipeline: Pipeline
        self.pusher: Pusher
        self.sglang: SGLangDeliveries
        self._health: HealthProbe | None = None
        self._warm = False
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, on_fatal: Callable[[str], None]) -> None:
        """Start the ranks and load the processors, in the background: `/health` says 503 meanwhile.

        Call it on the loop of the main thread. `on_fatal` is called once when the server cannot go on.
        """
        for path in sweep_stale():
            log.info("removed %s, left behind by a server that was killed", path)
        self._on_fatal = on_fatal
        settings = self.settings
        self._arena = Arena(settings.arena_mb << 20)
        self.pusher = Pusher(settings.send_timeout_s)
        frames = SGLangFrames(settings.sglang_receiver_module, settings.sglang_modality_module)
        self.sglang = SGLangDeliveries(self.pusher, frames, self.pools.send, settings.send_timeout_s)
        self._announcer.start(settings.advertise_port or self.port)
        options = SupervisorOptions(settings.stall_s, settings.load_timeout_s, restarts=settings.max_restarts)
        self._engine = Supervisor(self._spec, self._arena, options, self._fail)
        budgets = {
            Modality.IMAGE: settings.image_batch_tokens,
            Modality.VIDEO: settings.video_batch_tokens,
            Modality.AUDIO: settings.audio_batch_tokens,
        }
        self._batcher = Batcher(self._engine, budgets, self.metrics)
        self._cache = EmbeddingCache(int(settings.cache_gb * (1 << 30)), self.metrics)
        store = [self.store.run()] if self.store is not None else []
        for work in (*store, self._engine.run(), self._batcher.run(), self._load_processors(), self._watch_lag()):
            task = asyncio.create_task(work)
            task.add_done_callback(self._ended)
            self._tasks.append(task)

    async def stop(self) -> None:
        """Release everything. Requests still in work end with 503."""
        gc.unfreeze()  # or modules that count their objects at the end call them leaked
        await self._announcer.aclose()
        if self._health is not None:
            await self._health.close()
        for task in reversed(self._tasks):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self.pools.close()
        self.sglang.close()
        self.pusher.close()
        await self._source.aclose()
        self._arena.close()

    async def drain(self) -> None:
        """Withdraw what brings requests here, then take no new ones; those accepted go on."""
        await self._announcer.withdraw()
        self._draining = True

    async def start_profile(self, forwards: int | None) -> None:
        """See `Profiling.start`."""
        await self._profiling.start(self._engine, forwards)

    async def stop_profile(self) -> list[str]:
        """See `Profiling.stop`."""
        return await self._profiling.stop(self._engine)

    def not_ready(self) -> str | None:
        """Why requests are not taken, or None when they are."""
        if self._draining:
            return "the server is stopping"
        if self.fatal is not None:
            return self.fatal
        if not self._engine.ready:
            return f"the encoder is {self._engine.state}"
        if not self._warm:
            return "the encoder is warming up" if self._health else "the processors are loading"
        return None

    async def health(self) -> Verdict:
        """Encode something, or judge what is being encoded; see `HealthProbe`."""
        if self._health is None or self.fatal is not None:
            reason = self.fatal or "loading"
            ranks = dict(enumerate(self._engine.rank_states))
            return Verdict(
                False, {"status": "unhealthy", "reason": reason, "engine": self._engine.state, "ranks": ranks}
            )
        return await self._health.check()

    def render_metrics(self) -> bytes:
        """Prometheus text, its gauges brought up to date."""
        metrics = self.metrics
        metrics.queued.set(self._batcher.queued)
        metrics.in_flight.set(self._batcher.in_flight)
        metrics.undelivered.set(self.undelivered.bytes)
        metrics.registrations.set(len(self.sglang.registrations))
        metrics.arena_used.set(self._arena.used)
        metrics.arena_size.set(self._arena.size)
        metrics.cache_bytes.set(self._cache.bytes)
        metrics.restarts.set(self._engine.restarts)
        states = self._engine.rank_states or ["dead"] * self.settings.tp
        for rank, state in enumerate(states):
            metrics.rank_up.labels(str(rank)).set(state == "ready")
        return metrics.render()

    async def _load_processors(self) -> None:
        started = time.monotonic()
        try:
            preprocessor, media = await run(self.pools.preproc, self._build_preprocessor)
        except StartupError as error:
            self._fail(str(error))
            return
        except Exception as error:
            log.exception("loading the processors failed")
            self._fail(f"the checkpoint's processors cannot be loaded: {error}")
            return
        log.info("processors ready after %.1f s", time.monotonic() - started)
        self.pipeline = Pipeline(
            model=self.model_name,
            preprocessor=preprocessor,
            source=self._source,
            pools=self.pools,
            arena=self._arena,
            engine=self._engine,
            batcher=self._batcher,
            cache=self._cache,
            max_item_tokens=self.settings.max_item_tokens,
            metrics=self.metrics,
        )
        self._health = HealthProbe(self.pipeline, self._engine, self._batcher, media, self.settings.stall_s)
        await self._warm_up(self._health)

    async def _warm_up(self, health: HealthProbe) -> None:
        """Take requests once every modality has been encoded: that also creates communicators and compiles kernels."""
        await self._engine.wait_ready()
        while not (verdict := await health.check()).healthy:
            log.warning("not ready yet: %s", verdict.document["reason"])
            await asyncio.sleep(0.5)
        # What is loaded stays: a full collection that walks through it holds up the loop for 200 ms.
        gc.freeze()
        self._warm = True
        log.info("ready for requests")

    def _build_preprocessor(self):  # type: ignore[no-untyped-def]
        import torch

        from encode_server.models.preprocess import Preprocessor

        torch.set_num_threads(1)  # parallel over items, and the cores belong to the ranks
        preprocessor = Preprocessor(self._checkpoint, self._limits, self.settings.max_item_tokens)
        return preprocessor, {modality: preprocessor.probe(modality) for modality in sorted(preprocessor.modalities)}

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Nothing goes on without one of the background tasks; it must not die unnoticed."""
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a background task failed", exc_info=error)
            self._fail(f"a background task failed: {type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if self.fatal is None:
            self.fatal = reason
            self._on_fatal(reason)

    async def _watch_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self.metrics.loop_lag.observe(max(0.0, loop.time() - due))


def _media_source(settings: Settings, limits: MediaLimits, pools: Pools) -> MediaSource:
    try:
        UrlPolicy(settings.media_allow)
    except ValueError as error:
        raise StartupError(f"--media-allow: {error}") from None
    try:
        return MediaSource(settings.media_allow, settings.media_roots, limits, pools.preproc)
    except ValueError as error:
        raise StartupError(f"--media-roots: {error}") from None


def _embedding_store(settings: Settings, pools: Pools) -> EmbeddingStore | None:
    if settings.ec_store is None:
        return None
    age_s = settings.ec_store_age_s
    folder = EntryFolder(settings.ec_store, max_bytes=int(settings.ec_store_gb * (1 << 30)), max_age_s=age_s)
    return EmbeddingStore(folder, age_s, pools.store)


def media_limits(settings: Settings) -> MediaLimits:
    """The limits of one media item, from the options."""
    return MediaLimits(
        max_bytes=settings.max_media_mb << 20,
        max_pixels=settings.max_pixels,
        max_frames=settings.max_frames,
        max_audio_seconds=settings.max_audio_s,
        decode_seconds=settings.decode_s,
        fetch_seconds=settings.fetch_s,
    )
