"""One text of several servers' metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from encode_server.cluster.metrics import merged


def server(requests: int, held: int) -> str:
    registry = CollectorRegistry()
    counter = Counter("requests", "So many, {of} each kind", ["outcome"], registry=registry)
    counter.labels('a "b" {c} d').inc(requests)
    Gauge("held", "Bytes", registry=registry).set(held)
    return generate_latest(registry).decode()


def test_each_series_names_its_replica_and_each_family_comes_once():
    text = merged({"h:1": server(3, 10), "h:2": server(5, 20)})
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert text.count("# TYPE held gauge") == 1 and families["held"].documentation == "Bytes"
    held = {sample.labels["replica"]: sample.value for sample in families["held"].samples}
    assert held == {"h:1": 10, "h:2": 20}
    totals = [sample for sample in families["requests"].samples if sample.name == "requests_total"]
    assert {(one.labels["replica"], one.labels["outcome"]): one.value for one in totals} == {
        ("h:1", 'a "b" {c} d'): 3,
        ("h:2", 'a "b" {c} d'): 5,
    }
