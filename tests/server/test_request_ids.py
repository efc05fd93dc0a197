"""`X-Request-ID` and `traceparent` of a caller: on the answer, in the log, beside the durations in `/metrics`."""

from __future__ import annotations

import base64
import re

import httpx
import pytest

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def body(media: bytes) -> dict[str, object]:
    return {"modality": "image", "mm_items": [base64.b64encode(media).decode()]}


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/metrics", "/nowhere"])
def test_every_answer_returns_the_id(server, path):
    assert httpx.get(server.base_url + path, headers={"X-Request-ID": "abc-1"}).headers["x-request-id"] == "abc-1"
    assert re.fullmatch("[0-9a-f]{32}", httpx.get(server.base_url + path).headers["x-request-id"])


def test_an_encode_is_found_in_the_log_by_it(server, picture):
    headers = {"X-Request-ID": "order-66", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    answer = httpx.post(server.base_url + "/encode", json=body(picture(56, 56, 1)), headers=headers, timeout=60)
    assert answer.status_code == 200 and answer.headers["x-request-id"] == "order-66"
    req_id = answer.json()["req_id"]
    server.wait_for_log(f"req={req_id} modality=image destination=answer outcome=ok .* id=order-66 trace={TRACE}", 10)
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    assert f'# {{trace_id="{TRACE}"}}' in httpx.get(server.base_url + "/metrics", headers=accept).text


def test_a_refusal_is_found_by_it_too(server):
    refused = httpx.post(server.base_url + "/encode", content=b"{", headers={"X-Request-ID": "order-67"})
    assert refused.status_code == 400 and refused.headers["x-request-id"] == "order-67"
    server.wait_for_log("outcome=bad_request .* id=order-67", 10)


def test_a_body_without_a_name_gets_the_id_that_the_answer_returns(server, picture):
    answer = httpx.post(server.base_url + "/encode", json=body(picture(56, 56, 2)), timeout=60)
    assert answer.json()["req_id"] == answer.headers["x-request-id"]


def test_neither_media_nor_a_urls_query_is_logged(server):
    url = "http://127.0.0.1:9/image.png?token=verysecret"
    refused = httpx.post(server.base_url + "/encode", json={"modality": "image", "mm_items": [url]}, timeout=60)
    assert refused.status_code == 403
    server.wait_for_log("outcome=forbidden", 10)
    assert "verysecret" not in server.log
