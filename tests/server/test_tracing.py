"""`--tracing otlp`, whole: a server, and a collector that keeps what it is sent."""

from __future__ import annotations

import base64

import httpx

from tests.collector import attributes, collecting
from tests.live import LiveServer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_the_stages_of_a_request_arrive_at_the_collector(checkpoint, tmp_path, picture):
    with (
        collecting() as collector,
        LiveServer(checkpoint, tmp_path / "s", "--tracing", "otlp", environment=collector.environment) as server,
    ):
        server.healthy()
        body = {"modality": "image", "mm_items": [base64.b64encode(picture(56, 56, 1)).decode()]}
        headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01", "baggage": "secret=1"}
        assert httpx.post(server.base_url + "/encode", json=body, headers=headers, timeout=60).status_code == 200
        server.wait_for_log(f"trace={TRACE}", 10)
        assert server.terminate() == 0
    spans = [span for span in collector.spans if span.trace_id.hex() == TRACE]
    by_name = {span.name: span for span in spans}
    assert set(by_name) == {"POST /encode", "fetch", "preprocess", "copy", "queue", "forward", "deliver", "batch"}
    assert len(spans) == len(collector.spans), "probes leave no spans"
    request, batch = by_name["POST /encode"], by_name["batch"]
    assert request.parent_span_id.hex() == "00f067aa0ba902b7"
    assert all(span.parent_span_id == request.span_id for span in spans if span is not request)
    assert [link.span_id for link in by_name["forward"].links] == [batch.span_id]
    assert [link.span_id for link in batch.links] == [request.span_id]
    stages = [by_name[name] for name in ("fetch", "preprocess", "copy", "queue", "forward", "deliver")]
    starts = [span.start_time_unix_nano for span in stages]
    assert starts == sorted(starts) and all(span.start_time_unix_nano <= span.end_time_unix_nano for span in stages)
    said = attributes(request)
    assert said["encode.modality"] == "image" and said["encode.destination"] == "answer"
    assert "secret" not in str(collector.spans)
    assert collector.services == {"encode-server"}
