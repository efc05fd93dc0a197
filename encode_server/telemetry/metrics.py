"""The Prometheus metrics of one server, in a registry of its own. docs/metrics.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import choose_encoder

from encode_server.errors import EncodeError
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import DeviceMemory

Metric = TypeVar("Metric", Counter, Gauge, Histogram)

DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 180)
STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LAG_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1)
TOKEN_BUCKETS = (16, 64, 256, 1024, 4096, 8192, 16384, 32768, 65536, 131072)

STAGES = ("fetch", "preprocess", "copy", "queue", "forward", "deliver")
CPU_STAGES = ("decode", "preprocess", "copy")
UNKNOWN = "unknown"  # modality and destination of a request that ended before its body was read
DESTINATIONS = ("answer", "push", "store", "cache")
ERRORS: tuple[type[EncodeError], ...] = (EncodeError, *EncodeError.__subclasses__())
OUTCOMES = ("ok", "gone", *sorted({error.code for error in ERRORS}))
REFUSING = ("requests", "bytes", "tokens", "client_share", "undelivered", "store")
SHARED_LOOK_UPS = ("hit", "miss", "skipped", "late", "timeout", "unreachable", "refused", "garbled")
SHARED_WRITES = ("stored", "skipped", "dropped", "too_large", "full", "timeout", "unreachable", "refused")
GROUP_CAUSES = ("died", "hang", "failed", "divided", "garbled", "not_started")
PREPARER_CAUSES = ("died", "hang", "overtime", "failed")


class Bounded:
    """Two gauges: what is held now, and the most that may be."""

    def __init__(self, name: str, documentation: str, registry: CollectorRegistry) -> None:
        self._held = Gauge(name, documentation, registry=registry)
        self._limit = Gauge(f"{name}_limit", f"Bound of {name}", registry=registry)

    def show(self, held: float, limit: float) -> None:
        """Set both."""
        self._held.set(held)
        self._limit.set(limit)


class Metrics:
    """What is counted. Names and labels are what `/metrics` shows.

    Series with labels are looked up here once: a look-up by label costs as much as the increment. It also makes a
    series exist, at 0, before its first event, without which a rate misses that event.
    """

    def __init__(self, version: str = "", groups: int = 1) -> None:
        """`groups`: of ranks, side by side."""
        of_groups = [str(index) for index in range(groups)]
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each counter and histogram, which nobody reads
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        PlatformCollector(registry=registry)
        Info("encode_build", "The version that runs", registry=registry).info({"version": version})

        # Requests and items.
        requests = self._counter("encode_requests", "Requests by modality and outcome", "modality", "outcome")
        self._requests = {
            (modality, outcome): requests.labels(modality, outcome)
            for modality in (UNKNOWN, *Modality)
            for outcome in OUTCOMES
        }
        self._duration = Histogram(
            "encode_request_duration_seconds",
            "From the request's arrival to the last byte of its answer",
            ["modality", "outcome", "destination"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        # Other outcomes get their series when they happen: all of them would be some thousands.
        self._durations: dict[tuple[str, str, str], Histogram] = {
            (modality, "ok", destination): self._duration.labels(modality, "ok", destination)
            for modality in Modality
            for destination in DESTINATIONS
        }
        stages = Histogram(
            "encode_stage_seconds",
            "Time an item, or in `deliver` a request, spent in a stage",
            ["stage", "modality"],
            buckets=STAGE_BUCKETS,
            registry=registry,
        )
        self.stage: Mapping[Modality, Mapping[str, Histogram]] = {
            modality: {stage: stages.labels(stage, modality) for stage in STAGES} for modality in Modality
        }
        self._stage_cpu = _children(
            self._counter("encode_stage_cpu_seconds", "Processor time that preparers spent on items", "stage"),
            CPU_STAGES,
        )
        self.items = _by_modality(self._counter("encode_items", "Items of requests that were answered", "modality"))
        self.preprocessed = _by_modality(
            self._counter("encode_preprocessed_items", "Items decoded and preprocessed", "modality")
        )
        self.tokens = _by_modality(self._counter("encode_tokens", "Embedding rows delivered", "modality"))
        self.batch_tokens = _by_modality(
            Histogram(
                "encode_batch_tokens",
                "Encoder tokens (patches, mel frames) of a batch",
                ["modality"],
                buckets=TOKEN_BUCKETS,
                registry=registry,
            )
        )
        self.cache = _children(
            self._counter("encode_cache_lookups", "Items looked up in the cache, by outcome", "outcome"),
            ("hit", "miss", "shared"),
        )
        self.shared_look_ups = _children(
            self._counter("encode_shared_cache_lookups", "Items looked up in the shared cache, by outcome", "outcome"),
            SHARED_LOOK_UPS,
        )
        self.shared_writes = _children(
            self._counter("encode_shared_cache_writes", "Items written to the shared cache, by outcome", "outcome"),
            SHARED_WRITES,
        )
        self.shared_seconds = _children(
            Histogram(
                "encode_shared_cache_seconds",
                "Time of a look-up, and of a round trip that writes",
                ["operation"],
                buckets=STAGE_BUCKETS,
                registry=registry,
            ),
            ("get", "put"),
        )
        self.shared_bytes = _children(
            self._counter("encode_shared_cache_bytes", "Bytes of embeddings read and written", "direction"),
            ("read", "written"),
        )
        self.dropped = _children(
            self._counter("encode_dropped_items", "Items ended before their forward, by reason", "reason"),
            ("gone", "late"),
        )

        # What is bounded, and which bound refused.
        self.requests_held = self._bounded("encode_requests_in_progress", "Requests admitted and not ended")
        self.bytes_held = self._bounded("encode_inflight_bytes", "Bytes of bodies, downloads and embeddings of these")
        self.tokens_held = self._bounded("encode_inflight_tokens", "Patches and mel frames of these")
        self.arena_held = self._bounded("encode_arena_used_bytes", "Bytes of the arena granted")
        self.undelivered_held = self._bounded("encode_undelivered_bytes", "Bytes of embeddings on their way out")
        self.cache_held = self._bounded("encode_cache_bytes", "Bytes of embeddings in the cache")
        self.shared_queued = self._bounded(
            "encode_shared_cache_queued_bytes", "Bytes of embeddings that wait to be written to the shared cache"
        )
        self.store_held = self._bounded("encode_store_bytes", "Bytes in the embedding store, as last counted")
        self.pool_held = {
            "mooncake": self._bounded("encode_mooncake_pool_bytes", "Bytes of embeddings in Mooncake's memory"),
            "nixl": self._bounded("encode_nixl_pool_bytes", "Bytes of embeddings in NIXL's memory"),
        }
        self.pool_full = _children(
            self._counter("encode_pool_full", "Embeddings that found no room in registered memory", "pool"),
            ("mooncake", "nixl"),
        )
        self.threads_held = self._bounded("encode_preparer_threads_busy", "Preparers' threads that prepare an item")
        self.refusals = _children(
            self._counter("encode_refusals", "Requests refused, by the bound that refused", "bound"), REFUSING
        )

        # What waits.
        self.at_door = self._gauge("encode_requests_at_door", "Requests that wait to be admitted, their bodies unread")
        self.preparing_queued = self._gauge("encode_queued_preparations", "Items waiting for a preparer's thread")
        self.queued = self._gauge("encode_queued_items", "Items, or pieces of them, waiting for a batch")
        self.backlog = self._gauge("encode_backlog_seconds", "Seconds until what the server holds is encoded, learnt")
        self.in_flight = self._gauge("encode_batches_in_flight", "Batches sent to the ranks")
        self.forward_age = self._gauge("encode_oldest_forward_seconds", "Age of the oldest forward; 0 without one")
        self.forward_limit = self._gauge("encode_oldest_forward_seconds_limit", "Age at which it counts as a hang")
        self.registrations = self._gauge(
            "encode_registrations", "Parts for which destinations are registered or waited for"
        )

        self.shared_up = _children(
            Gauge("encode_shared_cache_up", "1 while the shared cache is asked", ["operation"], registry=registry),
            ("get", "put"),
        )

        # Processes.
        self.ready = self._gauge("encode_ready", "1 when requests are taken")
        self._rank_up = Gauge("encode_rank_up", "1 when the rank is ready", ["group", "rank"], registry=registry)
        self._device_memory = Gauge(
            "encode_device_memory_bytes",
            "Memory of the rank's device, as the rank said last",
            ["group", "rank", "kind"],
            registry=registry,
        )
        self._preparer_up = Gauge("encode_preparer_up", "1 when the preparer works", ["preparer"], registry=registry)
        restarts = self._counter("encode_group_restarts", "Restarts of a group of ranks, by cause", "group", "cause")
        self.group_restarts = {
            group: {cause: restarts.labels(group, cause) for cause in GROUP_CAUSES} for group in of_groups
        }
        self.group_batches = _children(
            self._counter("encode_group_batches", "Batches sent to a group of ranks", "group"), of_groups
        )
        self.group_up = _children(
            Gauge("encode_group_up", "1 when the group takes part in the work", ["group"], registry=registry), of_groups
        )
        self.group_in_flight = _children(
            Gauge("encode_group_batches_in_flight", "Batches in progress on the group", ["group"], registry=registry),
            of_groups,
        )
        self.group_backlog = _children(
            Gauge("encode_group_backlog_seconds", "Seconds of these, learnt", ["group"], registry=registry), of_groups
        )
        self.preparer_restarts = _children(
            self._counter("encode_preparer_restarts", "Preparers started in place of lost ones, by cause", "cause"),
            PREPARER_CAUSES,
        )
        self.replayed = Counter(
            "encode_replayed_items", "Items sent again because the ranks were lost", registry=registry
        )
        self.prepared_again = Counter(
            "encode_prepared_again_items", "Items prepared again because a preparer was lost", registry=registry
        )
        self.loop_lag = Histogram(
            "encode_loop_lag_seconds", "How late the event loop runs a timer", buckets=LAG_BUCKETS, registry=registry
        )

        # What has been learnt of a forward's cost; 0 before.
        self.capacity = self._gauge(
            "encode_capacity_tokens_per_second",
            "Encoder tokens that the ranks encode in a second",
        )
        self.speed = _by_modality(
            Gauge("encode_learnt_patches_per_second", "Speed of a forward", ["modality"], registry=registry)
        )
        self.patches_per_pair = _by_modality(
            Gauge(
                "encode_learnt_patches_per_pair",
                "Patches that cost as much as a pair of patches in attention",
                ["modality"],
                registry=registry,
            )
        )

    def end_request(
        self, modality: str, outcome: str, destination: str, seconds: float, trace_id: str | None = None
    ) -> None:
        """Count a request that has ended; `trace_id` goes with its duration as an exemplar."""
        self._requests[modality, outcome].inc()
        key = (modality, outcome, destination)
        if key not in self._durations:
            self._durations[key] = self._duration.labels(*key)
        self._durations[key].observe(seconds, {"trace_id": trace_id} if trace_id else None)

    def spend(self, stage: str, seconds: float) -> None:
        """Count processor time of a stage."""
        self._stage_cpu[stage].inc(seconds)

    def show_ranks(self, group: int, states: Iterable[bool]) -> None:
        """Which ranks of a group are ready."""
        for rank, state in enumerate(states):
            self._rank_up.labels(str(group), str(rank)).set(state)

    def show_device_memory(self, ranks: Iterable[tuple[int, int, DeviceMemory]]) -> None:
        """What ranks said of their devices: group, rank, memory. Ranks that are not among these have no series."""
        self._device_memory.clear()
        for group, rank, memory in ranks:
            for kind in DeviceMemory.__struct_fields__:
                self._device_memory.labels(str(group), str(rank), kind).set(getattr(memory, kind))

    def show_preparers(self, states: Iterable[bool]) -> None:
        """Which preparers work."""
        for index, state in enumerate(states):
            self._preparer_up.labels(str(index)).set(state)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The text, and its content type: OpenMetrics, with exemplars, where the header `Accept` asks for it."""
        encode: Callable[[CollectorRegistry], bytes]
        try:
            encode, content_type = choose_encoder(accept)
        except (ValueError, TypeError):  # a version that is none
            encode, content_type = choose_encoder("")
        return encode(self.registry), content_type

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(name, documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        return Gauge(name, documentation, registry=self.registry)

    def _bounded(self, name: str, documentation: str) -> Bounded:
        return Bounded(name, documentation, self.registry)


def _children(metric: Metric, values: Iterable[str]) -> Mapping[str, Metric]:
    """The series of a metric with one label, by that label's value."""
    return {value: metric.labels(value) for value in values}


def _by_modality(metric: Metric) -> Mapping[Modality, Metric]:
    return {modality: metric.labels(modality) for modality in Modality}
