"""Spans: those of stages lie in the request's trace, batches link to their requests, probes leave none."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import format_trace_id
from starlette.testclient import TestClient

from encode_server.pipeline.batcher import Batcher
from encode_server.telemetry.ids import current_ids
from encode_server.telemetry.metrics import Metrics
from encode_server.telemetry.request_ids import RequestIds
from encode_server.telemetry.tracing import Tracing, describe_request, fastapi_telemetry, otlp_tracing, recorded_context
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import Done
from tests.pipeline.engine_standin import StandInEngine

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.fixture
def traced():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracing(provider), exporter.get_finished_spans


def app(tracing: Tracing | None) -> TestClient:
    made = FastAPI(telemetry=fastapi_telemetry(tracing))
    made.add_middleware(RequestIds)

    @made.get("/encode")
    @made.get("/health")
    async def answer() -> str | None:
        describe_request(modality="image", tokens=4, outcome=None)
        if tracing is not None:
            tracing.stage("fetch", 0.25)
            tracing.stage("forward", 0.5, ended_s_ago=1.0, patches=64)
        return current_ids().trace_id

    return TestClient(made)


@pytest.mark.parametrize("flags", ["01", "00"])
def test_the_callers_trace_goes_on_with_a_span_for_each_stage(traced, flags):
    tracing, spans = traced
    header = f"00-{TRACE}-{PARENT}-{flags}"
    assert app(tracing).get("/encode", headers={"traceparent": header}).json() == TRACE
    if flags == "00":  # the caller says that nobody records this trace
        assert spans() == ()
        return
    by_name = {span.name: span for span in spans()}
    request = by_name.pop("GET /encode")
    assert format(request.parent.span_id, "016x") == PARENT
    assert request.attributes["encode.modality"] == "image" and request.attributes["encode.tokens"] == 4
    assert "encode.outcome" not in request.attributes
    assert set(by_name) == {"fetch", "forward"}
    for span in by_name.values():
        assert span.parent.span_id == request.context.span_id
        assert format_trace_id(span.context.trace_id) == TRACE
    fetch, forward = by_name["fetch"], by_name["forward"]
    assert fetch.end_time - fetch.start_time == 250_000_000 and forward.end_time - forward.start_time == 500_000_000
    assert fetch.end_time - forward.end_time == pytest.approx(1e9, abs=5e8)
    assert forward.attributes["patches"] == 64


def test_without_a_callers_trace_the_request_begins_its_own(traced):
    tracing, spans = traced
    trace_id = app(tracing).get("/encode").json()
    assert {format_trace_id(span.context.trace_id) for span in spans()} == {trace_id}


def test_probes_and_servers_without_tracing_leave_no_span(traced):
    tracing, spans = traced
    app(tracing).get("/health")
    assert app(None).get("/encode").json() is None
    assert spans() == ()


def test_a_batch_links_to_its_requests_and_they_to_it(traced):
    tracing, spans = traced

    class Item(SimpleNamespace):
        __hash__ = object.__hash__

    def job(recorded: bool) -> Item:
        made = Item(modality=Modality.IMAGE, client="a", reserved=False, abandoned=False, batches=[], group=None)
        made.deadline, made.done, made.trace = time.monotonic() + 60, asyncio.Event(), None
        made.began, made.ended = lambda piece: None, lambda piece, error, forward_s: made.done.set()
        made.pieces = [SimpleNamespace(job=made, item=None, cost=10, pairs=0, failures=0)]
        if recorded:
            with tracing.provider.get_tracer("test").start_as_current_span("request"):
                made.trace = recorded_context()
        return made

    async def forward() -> list[Item]:
        jobs = [job(True), job(True), job(False)]
        ranks = StandInEngine()
        ranks.rule = lambda batch: Done(0, 0, forward_s=0.01)
        batcher = Batcher(ranks, dict.fromkeys(Modality, 1000), Metrics(), tracing)
        for one in jobs:
            batcher.submit(one)
        running = asyncio.create_task(batcher.run())
        for one in jobs:
            await asyncio.wait_for(one.done.wait(), 5)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return jobs

    jobs = asyncio.run(forward())
    (batch,) = [span for span in spans() if span.name == "batch"]
    assert [link.context for link in batch.links] == [jobs[0].trace, jobs[1].trace]
    assert dict(batch.attributes) == {"modality": "image", "pieces": 3, "patches": 30}
    assert jobs[0].batches == [batch.context] and jobs[2].batches == []


def test_a_collector_that_is_not_there_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    tracing = otlp_tracing("1.2.3")
    tracing.provider.get_tracer("test").start_span("lost").end()
    began = time.monotonic()
    tracing.close()
    assert time.monotonic() - began < 5
