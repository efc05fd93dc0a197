"""Every wrong request gets the documented error, says what was wrong, and harms nobody else."""

import asyncio
import base64
import socket
from pathlib import Path

import httpx
import pytest

from encode_server.client import EncodeClient, EncodeServerError
from tests.live import eventually


def post(server, body, **kwargs):
    return httpx.post(server.base_url + "/encode", json=body, timeout=30, **kwargs)


def image_body(png, **fields):
    return {"mm_items": [base64.b64encode(png).decode()], "modality": "image"} | fields


@pytest.mark.parametrize(
    ("change", "status", "code", "says"),
    [
        ({"mm_items": []}, 400, "bad_request", "mm_items"),
        ({"mm_items": "abc"}, 400, "bad_request", "Expected `array`"),
        ({"mm_items": [3]}, 400, "bad_request", "mm_items"),
        ({"mm_items": [{"no_url": 1}]}, 400, "bad_request", "url"),
        ({"modality": "smell"}, 400, "bad_request", "image, video or audio"),
        ({"modality": None}, 400, "bad_request", "modality"),
        ({"num_parts": 0}, 400, "bad_request", "num_parts"),
        ({"num_parts": 2, "part_idx": 2}, 400, "bad_request", "part_idx is 2"),
        ({"timeout_s": -1}, 400, "bad_request", "timeout_s"),
        ({"prefill_host": "127.0.0.1"}, 400, "bad_request", "embedding_port"),
        ({"prefill_host": "127.0.0.1", "embedding_port": 700000}, 400, "bad_request", "1 to 65535"),
        ({"prefill_host": "8.8.8.8", "embedding_port": 5000}, 403, "forbidden", "8.8.8.8"),
        ({"mm_items": ["%%%"]}, 400, "bad_media", "mm_items[0]"),
        ({"mm_items": [base64.b64encode(b"no picture").decode()]}, 400, "bad_media", "mm_items[0]"),
        ({"mm_items": ["http://127.0.0.1:9/x.png"]}, 403, "forbidden", "127.0.0.1"),
        ({"mm_items": ["file:///etc/passwd"]}, 403, "forbidden", "file"),
        ({"mm_items": [{"url": "AAAA", "content_hash": "sha256:00"}]}, 400, "bad_request", "content_hash"),
        ({"modality": "image", "mm_items": ["x"] * 300}, 400, "bad_request", "300 items"),
    ],
)
def test_wrong_requests(server, picture, change, status, code, says):
    answer = post(server, image_body(picture(28, 28), req_id="wrong") | change)
    document = answer.json()
    assert (answer.status_code, document["status"], document["code"]) == (status, "error", code), document
    assert says in document["message"]
    assert "Traceback" not in document["message"] and str(Path(__file__).parents[2]) not in document["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"mm_items": ["\\ud800"], "modality": "image"}', b'{"a":' + b"[" * 9000],
    ids=["empty", "cut", "list", "null", "no UTF-8", "surrogate", "deep"],
)
def test_bodies_that_are_no_json_request(server, body):
    answer = httpx.post(server.base_url + "/encode", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and answer.json()["status"] == "error"


def test_forms_without_media_say_so(server):
    answer = httpx.post(server.base_url + "/encode", data={"modality": "image"}, files={"x": (None, "y")})
    assert answer.status_code == 400 and "no file" in answer.json()["message"]


def test_one_bad_item_fails_its_own_request_only(server, reference, picture):
    good = [picture(56, 56, seed) for seed in range(8)]

    async def mixed():
        async with EncodeClient(server.base_url) as client:
            requests = [client.encode([png], "image") for png in good]
            requests.insert(4, client.encode([good[0], b"broken", good[1]], "image"))
            return await asyncio.gather(*requests, return_exceptions=True)

    results = asyncio.run(mixed())
    failed = results.pop(4)
    assert isinstance(failed, EncodeServerError) and failed.status == 400 and "mm_items[1]" in failed.message
    for png, embedding in zip(good, results, strict=True):
        assert abs(embedding.numpy() - reference.image(png)).max() <= 1e-4


def test_deadline(server, picture):
    answer = post(server, image_body(picture(900, 900), timeout_s=0.001))
    assert answer.status_code == 504 and answer.json()["code"] == "deadline_exceeded"


def test_nothing_is_kept_after_errors(server, picture):
    """Every arena slot comes back: whatever the tests before this one did, and who leaves in the middle."""

    def used() -> float:
        return server.metric("encode_arena_used_bytes")

    async def leave(seed: int) -> bool:
        """Whether it had an arena slot; the answer may be quicker than the look."""
        body = image_body(picture(1200, 1200, seed))
        async with httpx.AsyncClient(timeout=60) as client:
            asking = asyncio.create_task(client.post(server.base_url + "/encode", json=body))
            while not (held := await asyncio.to_thread(used)) and not asking.done():
                pass
            in_time = bool(held) and not asking.done()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            return in_time

    assert any(asyncio.run(leave(500 + attempt)) for attempt in range(20))
    assert eventually(lambda: used() == 0)


def test_unknown_paths_and_methods_are_errors_like_all_others(server):
    gone, wrong = httpx.get(server.base_url + "/encodes"), httpx.get(server.base_url + "/encode")
    assert gone.status_code == 404 and gone.json()["code"] == "not_found" and "/encodes" in gone.json()["message"]
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["status"] == "error" and wrong.json()["code"] == "method_not_allowed"


def test_a_form_does_not_choose_its_codec(server, picture):
    """Python has codecs that take quadratic time, and some that raise what nobody expects."""
    body = b'--x\r\nContent-Disposition: form-data; name="modality"\r\n\r\n' + b"a" * 2_000_000 + b"\r\n--x--\r\n"
    for charset in ("punycode", "undefined", "utf-8"):
        headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
        answer = httpx.post(server.base_url + "/encode", content=body, headers=headers, timeout=10)
        assert answer.status_code == 400 and answer.json()["code"] == "bad_request"
    answer = httpx.post(server.base_url + "/encode", content=body, headers={"Content-Type": "multipart/form-data"})
    assert answer.status_code == 400 and "boundary" in answer.json()["message"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"mm_items": ["file://" + "/a" * 2_000_000]}, 403),
        ({"mm_items": [""] * 300_000}, 400),
        ({"modality": "x" * 1_000_000}, 400),
        ({"prefill_host": "ü." * 20_000, "embedding_port": 1}, 400),
    ],
    ids=["long file URL", "many items", "long modality", "long host"],
)
def test_what_would_be_slow_to_refuse_is_refused_immediately(server, picture, change, status):
    answer = post(server, image_body(picture(28, 28)) | change)
    assert answer.status_code == status and len(answer.content) < 1000


def test_images_are_not_enlarged_beyond_what_is_encoded(server, picture):
    item = {"url": base64.b64encode(picture(28, 28)).decode(), "min_pixels": 60_000_000}
    answer = post(server, {"mm_items": [item], "modality": "image"})
    assert answer.status_code == 413 and "min_pixels" in answer.json()["message"]


def test_who_hangs_up_while_sending_is_counted_as_gone(server):
    """No traceback for it, and its place is free again."""
    host, port = server.base_url.removeprefix("http://").split(":")
    before = gone(server)
    for _ in range(3):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            connection.sendall(b"Content-Length: 100000\r\n\r\n{")
    assert eventually(lambda: gone(server) == before + 3)
    assert "ClientDisconnect" not in server.log
    assert server.metric("encode_requests_in_progress") == 0


def gone(server) -> float:
    return server.metric('encode_requests_total{modality="unknown",outcome="gone"}')
