"""One running server: its rooms, wired together, and its life from the first process to the last."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable

from anyio.lowlevel import checkpoint

from encode_server import __version__
from encode_server.delivery.active import ActiveParts
from encode_server.delivery.destinations import DestinationPolicy
from encode_server.delivery.outgoing import Outgoing
from encode_server.delivery.push import Pusher
from encode_server.delivery.sglang.announcer import Announcer, advertised_host
from encode_server.delivery.sglang.deliveries import SGLangDeliveries
from encode_server.delivery.sglang.frames import SGLANG_TIMEOUT_S, SGLangFrames
from encode_server.delivery.store import EmbeddingStore
from encode_server.delivery.undelivered import Undelivered
from encode_server.engine.arena import Arena
from encode_server.engine.profiling import Profiling
from encode_server.errors import NotReady, StartupError, UnknownModel, UnsupportedModality, first_of
from encode_server.media.sources import MediaSource
from encode_server.models.early import refuse_early
from encode_server.pipeline.admission import Admission
from encode_server.pipeline.health import Verdict
from encode_server.pipeline.request import EncodeRequest
from encode_server.pipeline.shared.cache import SharedCache, SharedLimits
from encode_server.runtime.changes import Changes
from encode_server.runtime.forkserver import Forkserver, Launched
from encode_server.runtime.notify import notify
from encode_server.runtime.pools import Pools, run
from encode_server.runtime.rundir import sweep_stale
from encode_server.runtime.turns import ClientTurns
from encode_server.service.destinations import Destinations
from encode_server.service.encoding import Encoding, build, inspect_checkpoint, take_fingerprint
from encode_server.service.gauges import show_gauges
from encode_server.service.judgement import keep_watch
from encode_server.service.keys import ApiKeys
from encode_server.service.options import (
    admission_limits,
    check_media_options,
    entry_folder,
    media_limits,
    mooncake_engine,
    nixl_agent,
    shared_address,
    shared_store,
)
from encode_server.settings import PRELOAD, Settings, preload_argument
from encode_server.telemetry.history import History
from encode_server.telemetry.metrics import Metrics
from encode_server.telemetry.tracing import Tracing
from encode_server.wire.checkpoint import Inspection
from encode_server.wire.embedding import Encoded
from encode_server.wire.load import Load
from encode_server.wire.modality import Modality
from encode_server.wire.pools import Pool
from encode_server.wire.preparers import Pickled

log = logging.getLogger(__name__)

LAG_INTERVAL_S = 0.25
PROBE_BYTES = 4 << 20  # of the arena, for the health probes of one group


class Server:
    """What lives while the server does. The constructor checks the settings, `running` opens and closes everything.

    Raises StartupError when the settings cannot work.
    """

    def __init__(self, settings: Settings, launched: Launched | None = None, tracing: Tracing | None = None) -> None:
        """`launched`: a forkserver that was started before, with `PRELOAD` and `preload_argument`. `tracing`: None
        where nothing is traced."""
        self.settings, self.tracing = settings, tracing
        self._launched = launched
        self.metrics = Metrics(__version__, settings.dp)
        self.history = History()
        self.started_at = time.time()
        self.port = settings.port  # whoever binds the socket corrects it
        self.patient = settings.protocol == "sglang"
        self.admission = Admission(admission_limits(settings))
        self.body_turns = ClientTurns(lambda: self.admission.clients)
        self.active = ActiveParts()
        self.undelivered = Undelivered(settings.undelivered_mb << 20, settings.client_share)
        self.keys = ApiKeys(settings.api_keys)
        self.fatal: str | None = None
        self.destinations: Destinations
        self.sglang: SGLangDeliveries | None = None
        self.destination_policy = DestinationPolicy(settings.destination_allow)
        self.folder = entry_folder(settings)
        self.shared: SharedCache | None = None
        self._shared_address = shared_address(settings)
        self._mooncake = mooncake_engine(settings, self.metrics)
        self._nixl = nixl_agent(settings, self.metrics)
        self.outgoing: dict[str, Outgoing] = {}  # by transport: memory for embeddings on their way
        if self._mooncake is not None and self._mooncake.room is not None:
            self.outgoing["mooncake"] = self._mooncake.room
        if self._nixl is not None:
            self.outgoing["nixl"] = self._nixl.room
        self._profiling = Profiling(settings.profile_dir)
        self._announcer = Announcer(
            settings.register_url,
            "https" if settings.ssl_certfile else "http",
            advertised_host(settings.advertise_host, settings.host),
            lambda: self.not_ready() is None,
        )
        check_media_options(settings)
        refuse_early(settings.model, settings.tp)
        self.encoding: Encoding | None = None
        self._changes = Changes()
        self._warm = False
        self._leaving = False  # said to those who ask whether to send requests here
        self._draining = False  # requests are refused

    @contextlib.asynccontextmanager
    async def running(self, on_fatal: Callable[[str], None]) -> AsyncIterator[None]:
        """Everything that lives. The encoder loads in the background: `/health` says 503 meanwhile.

        Enter it on the loop of the main thread. `on_fatal` is called once when the server cannot go on. Requests that
        are still in progress when the context is left end with 503.
        """
        for path in sweep_stale():
            log.info("removed %s, left behind by a server that was killed", path)
        settings = self.settings
        async with contextlib.AsyncExitStack() as stack:
            pools = Pools(settings.send_workers)
            stack.callback(pools.close)
            if self.tracing is not None:
                stack.push_async_callback(asyncio.to_thread, self.tracing.close)
            self.arena = Arena(settings.arena_mb << 20, PROBE_BYTES * settings.dp)
            stack.callback(self.arena.close)
            await checkpoint()  # or the first download would import what this imports: 50 ms of the loop
            source = MediaSource(settings.media_allow, settings.media_roots, media_limits(settings), pools.work)
            stack.push_async_callback(source.aclose)
            pusher = Pusher(settings.send_timeout_s)
            stack.callback(pusher.close)
            if self._shared_address is not None:
                limits = SharedLimits(settings.shared_cache_timeout_ms / 1000, settings.shared_cache_max_mb << 20)
                self.shared = SharedCache(shared_store(settings, self._shared_address), limits, self.metrics)
                stack.callback(self.shared.close)
            store = None
            if self.folder is not None:
                alpha = f"image_alpha={settings.image_alpha}"
                store = EmbeddingStore(self.folder, settings.ec_store_age_s, pools.store, alpha)
            if settings.protocol == "sglang":
                frames = SGLangFrames(settings.sglang_receiver_module, settings.sglang_modality_module)
                if self._mooncake is not None:
                    stack.callback(self._mooncake.close)
                self.sglang = SGLangDeliveries(
                    pusher, frames, self._pickle, pools.send, settings.send_timeout_s, self._mooncake
                )
                stack.callback(self.sglang.close)
            self.destinations = Destinations(
                self.destination_policy,
                pusher,
                pools.send,
                self.sglang,
                store,
                keyed=bool(settings.api_keys),
                nixl=self._nixl,
            )
            if self._nixl is not None:
                stack.callback(self._nixl.close)
            self.pools = pools
            stack.callback(gc.unfreeze)  # or modules that count their objects at the end call them leaked
            self._announcer.start(settings.advertise_port or self.port)
            stack.push_async_callback(self._announcer.aclose)
            life = asyncio.create_task(self._live(source, store, on_fatal))
            stack.push_async_callback(_end, life)
            yield

    def sglang_deliveries(self) -> SGLangDeliveries:
        """Where prefill ranks say what they wait for (SGLang)."""
        assert self.sglang is not None
        return self.sglang

    async def drain(self) -> None:
        """Say that the server leaves, and withdraw what brings requests here; for `--drain-s` take those that come all
        the same, because load balancers notice late; then take no new ones. Those accepted go on."""
        self._leaving = True
        notify("STOPPING=1")
        await self._announcer.withdraw()
        if self.settings.drain_s and self.not_ready() is None:
            log.info("leaving: requests are taken for %g s more", self.settings.drain_s)
            await asyncio.sleep(self.settings.drain_s)
        self._draining = True
        self._changes.announce()

    @property
    def leaving(self) -> bool:
        """Whether the server has been told to end."""
        return self._leaving

    @property
    def model_name(self) -> str:
        """What the model is called in answers: the first of --served-model-name, else the checkpoint, as the operator
        gave it."""
        return self.model_names[0]

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names by which requests may call the model."""
        return self.settings.served_model_name or (self.settings.model,)

    def check_model(self, name: str | None) -> None:
        """Raise UnknownModel for a name that is not this model's. A request need not name it."""
        if name is not None and name not in self.model_names:
            raise UnknownModel(f"there is no model {name!r} here; this server has: {', '.join(self.model_names)}")

    async def pools_of(self, modality: Modality) -> list[Pool]:
        """How items of `modality` can be pooled. Raises NotReady, UnsupportedModality."""
        encoding = self._known()
        if modality not in encoding.pipeline.modalities:
            has = ", ".join(sorted(encoding.pipeline.modalities))
            raise UnsupportedModality(f"this model has no encoder for {modality}, it takes: {has}")
        return (await encoding.engine.until_ready()).pools(modality)

    def timeout_s(self, asked: float | None) -> float:
        """A request's deadline in seconds, from what its caller asks for."""
        default = self.settings.timeout_s
        if self.patient and "timeout_s" not in self.settings.model_fields_set:
            default = SGLANG_TIMEOUT_S
        return min(asked or default, self.settings.max_timeout_s)

    async def encode(self, request: EncodeRequest) -> Encoded:
        """The embedding of an admitted request, see `Pipeline.encode`."""
        if self.encoding is None:
            raise NotReady(self.not_ready() or "loading")
        return await self.encoding.pipeline.encode(request, self.encoding.route)

    async def until_open(self, wait_s: float) -> None:
        """Return once requests are taken, or when the server drains: whoever waits at the door then is still served.
        Raises NotReady when that takes longer than `wait_s` seconds, or never comes."""
        try:
            async with asyncio.timeout(wait_s):
                while (reason := self.not_ready()) is not None and not self._draining:
                    if self.fatal is not None:
                        raise NotReady(self.fatal)
                    await self._changes.wait()
        except TimeoutError:
            raise NotReady(f"{reason}, and was for {wait_s:g} s") from None

    async def start_profile(self, forwards: int | None) -> None:
        """See `Profiling.start`."""
        await self._profiling.start(self._known().engine, forwards)

    async def stop_profile(self) -> list[str]:
        """See `Profiling.stop`."""
        return await self._profiling.stop(self._known().engine)

    def unavailable(self) -> str | None:
        """Why no requests should be sent here, or None when they should be."""
        return "the server is stopping" if self._leaving else self.not_ready()

    def not_ready(self) -> str | None:
        """Why requests are not taken, or None when they are."""
        if self._draining:
            return "the server is stopping"
        if self.fatal is not None:
            return self.fatal
        if self.encoding is None:
            return "the checkpoint is being looked up"
        if not self.encoding.engine.ready:
            return f"the encoder is {self.encoding.engine.state}"
        if not self._warm:
            return "the encoder is warming up"
        return None

    def load(self) -> Load:
        """How much work there is, for those who choose among servers."""
        if (encoding := self.encoding) is None:
            return Load(0.0)
        backlog_s = encoding.batcher.backlog_s + encoding.preparers.backlog_s
        held = self.admission.held.requests
        if self.admission.waiting and held:
            # Who waits at the door brings as much work, on average, as those inside.
            backlog_s *= 1 + self.admission.waiting / held
        return Load(backlog_s, encoding.batcher.capacity)

    async def health(self) -> Verdict:
        """Encode something, or judge what is being encoded; see `HealthProbe`. A server that leaves is not healthy:
        whoever goes by this answer must stop sending requests."""
        if self._leaving:
            return Verdict(
                False, {"status": "unhealthy", "reason": self.unavailable(), "engine": "stopping", "ranks": {}}
            )
        if self.encoding is None or self.fatal is not None:
            reason = self.fatal or "loading"
            engine = "failed" if self.fatal else "loading"
            return Verdict(False, {"status": "unhealthy", "reason": reason, "engine": engine, "ranks": {}})
        verdict = await self.encoding.health.check()
        load = self.load()
        verdict.document |= {"backlog_seconds": round(load.backlog_s, 4), "capacity": load.capacity}
        return verdict

    async def render_metrics(self, accept: str) -> tuple[bytes, str]:
        """`/metrics`, its gauges brought up to date, and its content type; see `Metrics.render`."""
        show_gauges(self)
        return await run(self.pools.work, self.metrics.render, accept)  # some milliseconds: too long for the loop

    def _known(self) -> Encoding:
        if self.encoding is None:
            raise NotReady("the checkpoint is being looked up")
        return self.encoding

    async def _pickle(self, dtype: str, grid: list[list[int]] | None, seconds: list[float] | None) -> Pickled:
        return await self._known().preparers.pickle(dtype, grid, seconds)

    async def _live(self, source: MediaSource, store: EmbeddingStore | None, on_fatal: Callable[[str], None]) -> None:
        """Run the processes until cancelled. Nothing goes on without one of the background tasks: `on_fatal`."""
        settings = self.settings
        forkserver = Forkserver(PRELOAD, preload_argument(settings), self._launched)
        try:
            forkserver.start()
            async with asyncio.TaskGroup() as outer:
                keeper = outer.create_task(forkserver.run())
                try:
                    async with asyncio.TaskGroup() as group:
                        group.create_task(self._watch_lag())
                        group.create_task(keep_watch(self))
                        if store is not None:
                            group.create_task(store.run())
                        found = await inspect_checkpoint(forkserver, settings)
                        encoding = self._build(found, forkserver, source)
                        group.create_task(encoding.engine.run())
                        group.create_task(encoding.preparers.run())
                        group.create_task(encoding.batcher.run())
                        if self.shared is not None:
                            group.create_task(take_fingerprint(self.shared, forkserver, settings, found.path))
                        self.encoding = encoding
                        self._changes.announce()
                        await self._warm_up(encoding)
                finally:
                    # After the ranks and preparers, which end when the forkserver does.
                    keeper.cancel()
        except Exception as failure:
            self._fail(failure, on_fatal)

    def _build(self, found: Inspection, forkserver: Forkserver, source: MediaSource) -> Encoding:
        return build(
            found,
            forkserver,
            name=self.model_name,
            settings=self.settings,
            arena=self.arena,
            source=source,
            pools=self.pools,
            metrics=self.metrics,
            tracing=self.tracing,
            shared=self.shared,
        )

    async def _warm_up(self, encoding: Encoding) -> None:
        """Take requests once every modality has been encoded: that also creates communicators and compiles kernels."""
        await encoding.engine.wait_ready()
        await encoding.preparers.wait_ready()
        while not (verdict := await encoding.health.check()).healthy:
            log.warning("not ready yet: %s", verdict.document["reason"])
            await asyncio.sleep(0.1)
        # What is loaded stays: a full collection that walks through it holds up the loop.
        gc.freeze()
        self._warm = True
        self._changes.announce()
        log.info("ready for requests")
        notify("READY=1")
        while True:  # who waits at the door waits for the ranks, too
            await encoding.engine.changed()
            self._changes.announce()

    def _fail(self, failure: Exception, on_fatal: Callable[[str], None]) -> None:
        error = first_of(failure)
        if isinstance(error, StartupError):
            self.fatal = str(error)
        else:
            log.error("a background task failed", exc_info=failure)
            self.fatal = f"a background task failed: {type(error).__name__}: {error}"
        self._changes.announce()
        on_fatal(self.fatal)

    async def _watch_lag(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_INTERVAL_S
            await asyncio.sleep(LAG_INTERVAL_S)
            self.metrics.loop_lag.observe(max(0.0, loop.time() - due))


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
