"""What an answer may cost is known before the answer is made; who takes it slowly holds up nobody else."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time

import httpx
import pytest

from encode_server.delivery.undelivered import Undelivered
from encode_server.errors import TooBusy, TooLarge
from encode_server.runtime import bodies
from tests.live import eventually
from tests.security.requests import encode, item, raw

MIB = 1 << 20


def test_one_cached_image_many_times_is_charged_before_it_is_answered(server):
    large = item(784, 784, 1)
    one = encode(server, [large])
    assert one.status_code == 200
    of_one = len(one.content)
    many = min(256, 30 * MIB // of_one * 4 // 3)
    refused = encode(server, [large] * many)
    assert refused.status_code == 413 and "several requests" in refused.json()["message"]
    assert len(refused.content) < 1000
    assert eventually(lambda: server.metric("encode_undelivered_bytes") == 0, 10)


def test_undelivered_has_no_exception():
    async def check():
        held = Undelivered(100, 0.5)
        with pytest.raises(TooLarge):
            async with held.hold(101, "a", patient=False):
                pass
        async with held.hold(60, "a", patient=False):  # more than its share: one alone may be
            with pytest.raises(TooBusy, match="share"):
                async with held.hold(10, "a", patient=False):
                    pass
            async with held.hold(40, "b", patient=False):
                with pytest.raises(TooBusy, match="embeddings wait"):
                    async with held.hold(1, "c", patient=False):
                        pass
        assert held.bytes == 0

    asyncio.run(check())


def test_a_slow_reader_keeps_its_share_only_and_is_logged_truly(server):
    """An answer of 10 MB read at a few KB a second, by one client, beside another's answer of as much."""
    large = item(784, 784, 2)
    size = len(encode(server, [large]).content)
    body = json.dumps({"modality": "image", "req_id": "slow", "mm_items": [large] * (10 * MIB // size)}).encode()
    with raw(server) as connection:
        connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        assert eventually(lambda: server.metric("encode_undelivered_bytes") > 8 * MIB, 10)
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        with httpx.Client(transport=transport, timeout=60) as other:
            fields = {"modality": "image", "mm_items": [large] * (3 * MIB // size)}
            assert other.post(server.base_url + "/encode", json=fields).status_code == 200
            again = encode(server, [large] * (3 * MIB // size))
            assert again.status_code == 429 and "share" in again.json()["message"]
        began = time.monotonic()
        while time.monotonic() - began < 40 and "req=slow" not in server.log:
            time.sleep(0.1)
            if not connection.recv(1000):
                break
        found = server.wait_for_log(r"req=slow .*outcome=(\w+)", 10)
        assert found[1] in ("delivery_failed", "gone"), found[0]
    assert eventually(lambda: server.metric("encode_undelivered_bytes") == 0, 10)


def test_a_rate_counts_only_the_time_in_which_the_client_is_waited_for(monkeypatch):
    monkeypatch.setattr(bodies, "GRACE_S", 0.2)

    async def check():
        rate = bodies.LeastRate(1000)
        await asyncio.sleep(0.4)
        assert await rate.wait(asyncio.sleep(0.01, "in time")) == "in time"
        rate.count(100)
        with pytest.raises(TimeoutError):
            await rate.wait(asyncio.sleep(5))

    asyncio.run(check())


def test_what_a_stranger_writes_begins_no_log_line(server):
    forged = "x\n2026-01-01 00:00:00,000 INFO encode_server.requests: req=forged\x1b[31m\x9b outcome=ok"
    assert encode(server, req_id=forged).status_code == 200
    line = server.wait_for_log(r".*req=forged.*", 10)[0]
    assert '"x\\n2026' in line and not re.search(r"[\x00-\x1f\x7f-\x9f]", line)
    assert base64.b64encode(forged.encode()).decode() not in server.log
