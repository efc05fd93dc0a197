"""`encode-server route --tracing otlp`: a real proxy process between stand-ins, and a collector of its spans."""

from __future__ import annotations

import httpx
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.collector import attributes, collecting
from tests.fleet.encoder_standin import EncoderStandIn
from tests.fleet.engine_standin import EngineStandIn, served
from tests.fleet.test_sglang_route import Rank, route, to
from tests.live import eventually

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "shop=7", "baggage": "secret=1"}


def part(name: str, **more: object) -> dict[str, object]:
    body = {"req_id": name, "modality": "IMAGE", "mm_items": [{"url": name}], "num_parts": 1, "part_idx": 0}
    return body | {"prefill_host": "127.0.0.1"} | more


def test_a_request_and_what_the_proxy_asks_for_it_are_spans_of_the_callers_trace(tmp_path, context):
    engine, rank = EngineStandIn(tmp_path), Rank(context)
    engine.go_on.set()
    dying = EncoderStandIn(mode="dies")
    with collecting() as collector, dying, EncoderStandIn() as well, served(engine.app()) as engine.url:
        well.backlog_s = 30.0  # so that the other is asked first
        options = ("--engine-url", engine.url, "--tracing", "otlp", "--choice", "least_loaded", *to(dying, well))
        with route(tmp_path, *options, **collector.environment) as live:
            backlog = f'route_encoder_backlog_seconds{{encoder="{well.url}"}}'
            assert eventually(lambda: live.metric(backlog) > 0)
            port = int(rank.url.rpartition(":")[2])
            encode = part("a", embedding_port=port)
            assert httpx.post(live.base_url + "/encode", json=encode, headers=HEADERS, timeout=60).status_code == 200
            chat = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "?"}]}
            url = live.base_url + "/v1/chat/completions?key=secret"
            assert httpx.post(url, json=chat, headers=HEADERS, timeout=60).status_code == 200
            for probe in ("/health", "/readyz", "/livez", "/metrics", "/status", "/list_encoder_urls"):
                httpx.get(live.base_url + probe, headers=HEADERS, timeout=60)
            assert live.terminate() == 0
    assert all(span.trace_id.hex() == TRACE for span in collector.spans), "probes leave no spans"
    requests = {s.name: s for s in collector.spans if s.kind == Span.SPAN_KIND_SERVER}
    calls = [s for s in collector.spans if s.kind == Span.SPAN_KIND_CLIENT]
    assert requests.keys() == {"POST /encode", "POST /v1/chat/completions"}
    assert {s.parent_span_id.hex() for s in requests.values()} == {CALLER}

    asked = {str(attributes(s)["url.full"]): s for s in calls}
    died, done = asked[dying.url + "/encode"], asked[well.url + "/encode"]
    assert died.parent_span_id == done.parent_span_id == requests["POST /encode"].span_id
    assert died.status.code == Status.STATUS_CODE_ERROR and attributes(died)["error.type"] == "ServerUnreachable"
    assert done.status.code != Status.STATUS_CODE_ERROR and attributes(done)["http.response.status_code"] == 200
    for encoder, span in ((dying, died), (well, done)):
        (seen,) = encoder.headers
        assert seen["traceparent"] == f"00-{TRACE}-{span.span_id.hex()}-01", "the encoder's spans lie below the call's"
        assert seen["tracestate"] == "shop=7" and seen["baggage"] == "secret=1"

    known, streamed = asked[engine.url + "/v1/models"], asked[engine.url + "/v1/chat/completions"]
    assert known.parent_span_id == streamed.parent_span_id == requests["POST /v1/chat/completions"].span_id
    assert streamed.end_time_unix_nano >= streamed.start_time_unix_nano
    (seen,) = engine.headers
    assert seen["traceparent"] == f"00-{TRACE}-{streamed.span_id.hex()}-01" and seen["baggage"] == "secret=1"
    assert len(calls) == 4
    assert all("secret" not in str(span) for span in calls)
    assert collector.services == {"encode-server-route"}


def test_a_proxy_that_does_not_trace_passes_the_callers_header_on(tmp_path, context):
    with EncoderStandIn() as encoder, route(tmp_path, *to(encoder)) as live:
        port = int(Rank(context).url.rpartition(":")[2])
        encode = part("a", embedding_port=port)
        assert httpx.post(live.base_url + "/encode", json=encode, headers=HEADERS, timeout=60).status_code == 200
        (seen,) = encoder.headers
        assert {name: seen[name] for name in HEADERS} == HEADERS
