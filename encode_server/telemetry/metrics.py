"""The Prometheus metrics of one server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from encode_server.wire.modality import Modality

Metric = TypeVar("Metric", Counter, Histogram)

STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STAGES = ("fetch", "preprocess", "copy", "queue", "forward", "deliver")
CPU_STAGES = ("decode", "preprocess", "copy")
TOKEN_BUCKETS = (16, 64, 256, 1024, 4096, 8192, 16384, 32768, 65536, 131072)


class Metrics:
    """What is counted. Names and labels are what `/metrics` shows.

    Series with labels are looked up here once: a look-up by label costs as much as the increment.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "encode_requests", "Requests by modality and outcome", ["modality", "outcome"], registry=self.registry
        )
        self._requests: dict[tuple[str, str], Counter] = {}
        stage = Histogram(
            "encode_stage_seconds",
            "Time an item or request spent in a stage",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        self.stage: Mapping[str, Histogram] = {name: stage.labels(name) for name in STAGES}
        stage_cpu = Counter(
            "encode_stage_cpu_seconds",
            "Processor time that the preparers spent on an item, by stage",
            ["stage"],
            registry=self.registry,
        )
        self._stage_cpu = {name: stage_cpu.labels(name) for name in CPU_STAGES}
        self.items = _by_modality(
            Counter("encode_items", "Media items by modality", ["modality"], registry=self.registry)
        )
        self.preprocessed = _by_modality(
            Counter("encode_preprocessed_items", "Items decoded and preprocessed", ["modality"], registry=self.registry)
        )
        self.tokens = _by_modality(
            Counter("encode_tokens", "Embedding rows delivered, by modality", ["modality"], registry=self.registry)
        )
        self.batch_tokens = _by_modality(
            Histogram(
                "encode_batch_tokens",
                "Encoder tokens (patches, mel frames) of a batch",
                ["modality"],
                buckets=TOKEN_BUCKETS,
                registry=self.registry,
            )
        )
        cache = Counter("encode_cache", "Items looked up in the cache, by outcome", ["outcome"], registry=self.registry)
        self.cache: Mapping[str, Counter] = {name: cache.labels(name) for name in ("hit", "miss", "shared")}
        self.prepared_again = Counter(
            "encode_prepared_again_items", "Items prepared again because a preparer was lost", registry=self.registry
        )
        self.preparer_up = Gauge(
            "encode_preparer_up", "1 when the preparer can work", ["preparer"], registry=self.registry
        )
        self.preparer_restarts = Gauge(
            "encode_preparer_restarts", "Preparers started in place of lost ones", registry=self.registry
        )
        self.preparing_queued = Gauge(
            "encode_queued_preparations", "Items waiting for a preparer's thread", registry=self.registry
        )
        self.cache_bytes = Gauge("encode_cache_bytes", "Bytes of embeddings in the cache", registry=self.registry)
        self.dropped = Counter(
            "encode_dropped_items", "Items ended before their forward, by reason", ["reason"], registry=self.registry
        )
        self.replayed = Counter(
            "encode_replayed_items", "Items sent again because the ranks were lost", registry=self.registry
        )
        self.in_progress = Gauge(
            "encode_requests_in_progress", "Requests admitted and not ended", registry=self.registry
        )
        self.inflight_bytes = Gauge(
            "encode_inflight_bytes", "Bytes of bodies, downloads and embeddings of these", registry=self.registry
        )
        self.inflight_tokens = Gauge(
            "encode_inflight_tokens", "Patches and mel frames of these", registry=self.registry
        )
        self.at_door = Gauge(
            "encode_requests_at_door", "Requests that wait to be admitted, their bodies unread", registry=self.registry
        )
        self.backlog = Gauge(
            "encode_backlog_seconds",
            "Seconds until what the server holds is encoded, by learnt costs",
            registry=self.registry,
        )
        self.capacity = Gauge(
            "encode_capacity_tokens_per_second",
            "Encoder tokens that the ranks encode in a second, learnt; 0 before that",
            registry=self.registry,
        )
        self.queued = Gauge("encode_queued_items", "Items waiting for a batch", registry=self.registry)
        self.in_flight = Gauge("encode_batches_in_flight", "Batches sent to the ranks", registry=self.registry)
        self.undelivered = Gauge(
            "encode_undelivered_bytes", "Bytes of embeddings that wait for a destination", registry=self.registry
        )
        self.registrations = Gauge(
            "encode_registrations", "Parts for which destinations are registered or waited for", registry=self.registry
        )
        self.arena_used = Gauge("encode_arena_used_bytes", "Bytes of the arena granted", registry=self.registry)
        self.arena_size = Gauge("encode_arena_size_bytes", "Bytes of the arena", registry=self.registry)
        self.rank_up = Gauge("encode_rank_up", "1 when the rank is ready", ["rank"], registry=self.registry)
        self.restarts = Gauge("encode_group_restarts", "Restarts of the rank group", registry=self.registry)
        self.loop_lag = Histogram(
            "encode_loop_lag_seconds",
            "How late the event loop runs a timer",
            buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1),
            registry=self.registry,
        )

    def count_request(self, modality: str, outcome: str) -> None:
        """Count a request that has ended."""
        key = (modality, outcome)
        if key not in self._requests:
            self._requests[key] = self.requests.labels(modality, outcome)
        self._requests[key].inc()

    def spend(self, stage: str, seconds: float) -> None:
        """Count processor time of a stage."""
        self._stage_cpu[stage].inc(seconds)

    def render(self) -> bytes:
        """The text format."""
        return generate_latest(self.registry)


def _by_modality(metric: Metric) -> Mapping[Modality, Metric]:
    return {modality: metric.labels(modality) for modality in Modality}
