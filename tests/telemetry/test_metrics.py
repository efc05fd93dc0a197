"""What Prometheus sees: the names that the docs list, series before their first event, exemplars."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain

from encode_server.telemetry.metrics import OUTCOMES, REFUSING, Metrics
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import DeviceMemory

DOCS = Path(__file__).parents[2].joinpath("docs/metrics.md").read_text()
OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def text(metrics: Metrics, accept: str = "") -> str:
    return metrics.render(accept)[0].decode()


def listed() -> dict[str, tuple[str, set[str]]]:
    """Type and labels by name, as docs/metrics.md has them; a metric with a bound stands for two."""
    found, bounded = {}, False
    for line in DOCS.splitlines():
        bounded = (line.startswith("| metric") and "| bound |" in line) or (bounded and line.startswith("|"))
        if not line.startswith("| `"):
            continue
        name, kind, labels, meaning = (cell.strip() for cell in line[1:-1].split("|", 3))
        name = name.strip("`")
        assert meaning, name
        found[name] = (kind, set() if bounded else set(re.findall(r"`(\w+)`", labels)))
        if bounded:
            found[f"{name}_limit"] = ("gauge", set())
    return found


def exposed(metrics: Metrics) -> dict[str, tuple[str, set[str]]]:
    metrics.show_ranks(0, [True])
    metrics.show_preparers([True])
    metrics.show_device_memory([(0, 0, DeviceMemory(3, 2, 1, 4))])
    return {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in plain(text(metrics))
    }


def test_the_docs_list_every_metric_with_its_type_and_labels():
    assert listed() == exposed(Metrics("1.2.3"))


def test_series_exist_before_their_first_event():
    samples = {(sample.name, *sorted(sample.labels.values())) for f in plain(text(Metrics())) for sample in f.samples}
    for modality in Modality:
        assert ("encode_request_duration_seconds_count", *sorted((modality, "ok", "answer"))) in samples
        for outcome in OUTCOMES:
            assert ("encode_requests_total", *sorted((modality, outcome))) in samples
    for bound in REFUSING:
        assert ("encode_refusals_total", bound) in samples


def test_no_created_series():
    metrics = Metrics()
    metrics.end_request("image", "ok", "answer", 0.1)
    assert "_created" not in text(metrics) and "_created" not in text(metrics, OPENMETRICS)


def test_the_memory_of_a_device_is_shown_while_its_rank_says_so():
    metrics = Metrics()
    metrics.show_device_memory([(0, 1, DeviceMemory(used=3, reserved=2, peak=1, total=4))])
    assert 'encode_device_memory_bytes{group="0",kind="reserved",rank="1"} 2.0' in text(metrics)
    metrics.show_device_memory([])
    assert "encode_device_memory_bytes{" not in text(metrics)


def test_an_outcome_never_seen_before_gets_its_series():
    metrics = Metrics()
    metrics.end_request("unknown", "too_busy", "unknown", 0.1)
    line = 'encode_request_duration_seconds_count{destination="unknown",modality="unknown",outcome="too_busy"} 1.0'
    assert line in text(metrics)


def test_openmetrics_carries_the_trace_of_a_request():
    metrics = Metrics()
    metrics.end_request("image", "ok", "push", 0.02, TRACE)
    metrics.end_request("image", "ok", "push", 0.2)
    body, content_type = metrics.render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    exemplars = [s.exemplar for family in openmetrics(body.decode()) for s in family.samples if s.exemplar]
    assert [(e.labels, e.value) for e in exemplars] == [({"trace_id": TRACE}, 0.02)]
    assert TRACE not in text(metrics)  # the older format has no place for it


def test_prometheus_tool_finds_no_fault():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    metrics = Metrics("1.2.3")
    exposed(metrics)
    found = subprocess.run([promtool, "check", "metrics"], input=text(metrics), text=True, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
