"""What should not get in does not, and no input makes the server answer with an error it did not mean."""

import base64
import json
import random
import shutil
import socket
import ssl
import subprocess

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from PIL import Image

from encode_server.media import samples as demo_media
from tests.live import LiveServer, eventually
from tests.media.samples import image_bytes, picture

OPENSSL = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -keyout key.pem -out cert.pem".split()  # noqa: SIM905
MEANT = {200, 400, 403, 405, 406, 409, 411, 413, 415, 422, 429, 502, 503, 504}


@pytest.fixture(scope="module")
def locked(checkpoint, tmp_path_factory):
    """A server with keys, TLS and one directory of media."""
    tmp = tmp_path_factory.mktemp("locked")
    (tmp / "media").mkdir()
    (tmp / "media" / "picture.png").write_bytes(demo_media.picture())
    (tmp / "secret.png").write_bytes(demo_media.picture())
    (tmp / "media" / "link.png").symlink_to(tmp / "secret.png")
    subprocess.run(
        [*OPENSSL, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=tmp,
        check=True,
        capture_output=True,
    )
    options = ["--ssl-certfile", str(tmp / "cert.pem"), "--ssl-keyfile", str(tmp / "key.pem")]
    options += ["--api-keys", "first-key,second-key", "--media-roots", str(tmp / "media"), "--send-timeout-s", "2"]
    with LiveServer(checkpoint, tmp / "s", *options) as live:
        live.verify = ssl.create_default_context(cafile=str(tmp / "cert.pem"))
        yield live.healthy(), tmp


def ask(server, item, key=None):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"modality": "image", "mm_items": [item]}
    return httpx.post(server.base_url + "/encode", json=body, headers=headers, verify=server.verify, timeout=60)


def test_only_those_with_a_key_are_served(locked):
    server, _ = locked
    item = base64.b64encode(demo_media.picture()).decode()
    for key in (None, "wrong", "first-key2", ""):
        answer = ask(server, item, key)
        assert answer.status_code == 401 and answer.json()["code"] == "unauthorized"
    assert ask(server, item, "first-key").status_code == ask(server, item, "second-key").status_code == 200
    for open_path in ("/health", "/livez", "/readyz", "/metrics"):  # probes carry no keys
        assert httpx.get(server.base_url + open_path, verify=server.verify).status_code == 200


def test_files_are_confined_to_the_directory_named(locked):
    server, tmp = locked
    assert ask(server, f"file://{tmp}/media/picture.png", "first-key").status_code == 200
    for outside in (
        f"file://{tmp}/secret.png",
        f"file://{tmp}/media/../secret.png",
        f"file://{tmp}/media/link.png",
        f"file://{tmp}/media/%2e%2e/secret.png",
        "file:///proc/self/environ",
        "file:///dev/zero",
    ):
        answer = ask(server, outside, "first-key")
        assert answer.status_code in (400, 403), outside
        assert str(tmp) not in answer.json()["message"]  # not even whether it exists


def mutations(count: int, seed: int):
    """Real files, cut, flipped, spliced and padded."""
    rng = random.Random(seed)
    files = {"image": [demo_media.picture()], "video": [demo_media.clip()], "audio": [demo_media.sound()]}
    files["image"] += [image_bytes(kind, picture(64, 48)) for kind in ("JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    for _ in range(count):
        modality = rng.choices(["image", "video", "audio"], [8, 1, 1])[0]
        data = bytearray(rng.choice(files[modality]))
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(data))
            match rng.randrange(5):
                case 0:
                    del data[at:]
                case 1:
                    data[at] ^= 1 << rng.randrange(8)
                case 2:
                    data[at : at + rng.randint(1, 64)] = rng.randbytes(rng.randint(0, 64))
                case 3:
                    data[:at] = data[: at // 2]
                case 4:
                    data += rng.randbytes(rng.randint(1, 200))
            if not data:
                data = bytearray(b"\0")
        yield modality, bytes(data)


def test_a_client_that_never_reads_its_answer_is_left(locked):
    """Twenty times the same large picture: an answer of 20 MB, which no socket holds."""
    large = image_bytes("PNG", Image.new("RGB", (980, 980), "teal"))
    body = json.dumps({"modality": "image", "mm_items": [base64.b64encode(large).decode()] * 20}).encode()
    live, _ = locked
    lines = ("POST /encode HTTP/1.1", "Host: x", "Authorization: Bearer first-key", f"Content-Length: {len(body)}")
    host, port = live.base_url.removeprefix("https://").split(":")
    with (
        socket.create_connection((host, int(port))) as plain,
        live.verify.wrap_socket(plain, server_hostname=host) as connection,
    ):
        connection.sendall("\r\n".join((*lines, "", "")).encode() + body)
        assert connection.recv(20).startswith(b"HTTP/1.1 200")
        assert eventually(lambda: "took nothing of its answer" in live.log, 20)


@pytest.mark.parametrize("files", [250, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_files(server, files):
    with httpx.Client(timeout=120) as client:
        seen = {}
        for modality, data in mutations(files, seed=11):
            answer = client.post(server.base_url + "/encode", data={"modality": modality}, files={"f": ("f", data)})
            seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
            assert answer.status_code in (200, 400, 413), answer.text
        assert seen.get(400, 0) > files // 4  # it was damage
        assert client.get(server.base_url + "/health").status_code == 200


def test_damaged_requests(server):
    """JSON that is nearly right."""
    rng = random.Random(5)
    item = base64.b64encode(demo_media.picture()[:500]).decode()
    good = json.dumps(
        {"mm_items": [item, {"url": item, "fps": 2}], "modality": "image", "timeout_s": 5, "num_parts": 2}
    )
    with httpx.Client(timeout=60) as client:
        for _ in range(500):
            text = bytearray(good.encode())
            for _ in range(rng.randint(1, 5)):
                at = rng.randrange(len(text))
                text[at : at + rng.randint(0, 10)] = rng.choice(
                    [b"", b"null", b"{", b"]", b'"', b"-1", b"\xff", b"1e999"]
                )
            answer = client.post(
                server.base_url + "/encode", content=bytes(text), headers={"Content-Type": "application/json"}
            )
            assert answer.status_code in MEANT and answer.status_code < 500, answer.text


def test_what_the_openapi_document_promises(server):
    """Requests generated from our own OpenAPI document: each operation, what it allows and what it does not."""
    schema = schemathesis.openapi.from_url(server.base_url + "/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/encode", "/health", "/livez", "/readyz", "/metrics"}
    for operation in operations:
        if operation.path in ("/start_profile", "/stop_profile"):
            continue

        @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def check(case):
            answer = case.call(base_url=server.base_url, timeout=60)
            assert answer.status_code in MEANT, answer.text
            if answer.status_code >= 400 and case.path == "/encode":
                assert answer.json()["status"] == "error" and answer.json()["message"]

        check()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
def test_wrong_certificate_is_one_line(checkpoint, tmp_path):
    (tmp_path / "no.pem").write_text("nothing")
    with LiveServer(
        checkpoint,
        tmp_path / "s",
        "--ssl-certfile",
        str(tmp_path / "no.pem"),
        "--ssl-keyfile",
        str(tmp_path / "no.pem"),
    ) as live:
        assert live.process.wait(60) == 1
        assert live.wait_for_log("encode-server: --ssl-certfile")
        assert "Traceback" not in live.log
