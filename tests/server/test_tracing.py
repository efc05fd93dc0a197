"""`--tracing otlp`, whole: a server, and a collector that keeps what it is sent."""

from __future__ import annotations

import base64
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.live import LiveServer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Collector(ThreadingHTTPServer):
    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.service: set[str] = set()
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.service |= {
                a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
            }
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def collector():
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_the_stages_of_a_request_arrive_at_the_collector(checkpoint, tmp_path, picture, collector):
    where = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}"}
    with LiveServer(checkpoint, tmp_path / "s", "--tracing", "otlp", environment=where) as server:
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
    attributes = {a.key: a.value.string_value or a.value.int_value for a in request.attributes}
    assert attributes["encode.modality"] == "image" and attributes["encode.destination"] == "answer"
    assert "secret" not in str(collector.spans)
    assert collector.service == {"encode-server"}
