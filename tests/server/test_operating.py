"""What an operator asks of a server: what it is, when it is ready, and that it leaves without a failed request."""

from __future__ import annotations

import base64
import contextlib
import signal
import socket
import tarfile
import time
from pathlib import Path

import httpx
import pytest

from encode_server import __version__, cli
from tests.live import LiveServer, eventually

KEY = {"Authorization": "Bearer very-secret"}


@pytest.fixture
def systemd(tmp_path):
    """The socket to which a service of `Type=notify` writes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(60)
        yield listener


def encode(server: LiveServer, media: bytes) -> int:
    body = {"modality": "image", "mm_items": [base64.b64encode(media).decode()]}
    return httpx.post(server.base_url + "/encode", json=body, headers=KEY, timeout=60).status_code


def status(server: LiveServer, path: str) -> int:
    return httpx.get(server.base_url + path, timeout=10).status_code


def test_it_says_what_it_is_and_drains_before_it_leaves(checkpoint, tmp_path, picture, systemd):
    options = ["--api-keys", "very-secret", "--drain-s", "60"]
    environment = {"NOTIFY_SOCKET": systemd.getsockname(), "ENCODE_SERVER_PREPROC_WORKER": "3"}
    with LiveServer(checkpoint, tmp_path / "s", *options, environment=environment) as server:
        server.healthy()
        assert systemd.recv(100) == b"READY=1"
        assert "ENCODE_SERVER_PREPROC_WORKER is no option, did you mean ENCODE_SERVER_PREPROC_WORKERS?" in server.log

        assert status(server, "/server_info") == 401 and status(server, "/status") == 401
        assert status(server, "/") == 200, "the page has nothing of the server's: it asks for a key"
        shown = httpx.get(server.base_url + "/status", headers=KEY, timeout=10)
        assert shown.json()["verdict"]["level"] == "well" and "very-secret" not in shown.text
        info = httpx.get(server.base_url + "/server_info", headers=KEY, timeout=10)
        document = info.json()
        assert document["version"] == __version__ and document["state"] == "ready"
        assert document["settings"]["api_keys"] == 1 and document["settings"]["drain_s"] == 60
        assert document["packages"]["torch"] and document["encoder"]["dtype"] == "float32"
        assert "very-secret" not in info.text and "drain_s" in document["given"]

        bundle = tmp_path / "bundle.tar.gz"
        command = ["support-bundle", server.base_url, "--api-key", "very-secret", "--output", str(bundle)]
        assert cli.main(command) == 0
        with tarfile.open(bundle) as archive:
            held = {Path(member.name).name: archive.extractfile(member).read() for member in archive.getmembers()}
        assert {"server_info.json", "status.json", "health.json", "metrics.txt", "bundle.json"} <= held.keys()
        assert not any(b"very-secret" in content for content in held.values())

        server.process.send_signal(signal.SIGTERM)
        assert eventually(lambda: status(server, "/readyz") == 503, 2)
        assert status(server, "/health") == 503 and status(server, "/livez") == 200
        assert encode(server, picture(56, 56, 1)) == 200, "until the load balancer has noticed, requests still come"
        assert systemd.recv(100) == b"STOPPING=1"
        time.sleep(0.6)
        server.process.send_signal(signal.SIGTERM)  # the operator has seen enough
        server.process.wait(30)
        assert eventually(lambda: server.leftovers() == [], 10)


def test_a_drain_ends_by_itself(checkpoint, tmp_path):
    with LiveServer(checkpoint, tmp_path / "s", "--drain-s", "1") as server:
        server.healthy()
        assert server.terminate(60) == 0 and server.leftovers() == []
        assert "requests are taken for 1 s more" in server.log


def test_a_second_signal_does_not_wait_for_the_drain(checkpoint, tmp_path):
    with LiveServer(checkpoint, tmp_path / "s", "--drain-s", "300") as server:
        server.healthy()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for_log("requests are taken for 300 s more", 10)
        time.sleep(0.6)  # one Ctrl-C often arrives twice, so a second signal counts from half a second on
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(30)
        assert eventually(lambda: server.leftovers() == [], 10)


def test_a_server_that_is_not_ready_has_nothing_to_drain(checkpoint, tmp_path):
    with LiveServer(checkpoint, tmp_path / "s", "--drain-s", "300") as server:
        server.listening()
        with contextlib.suppress(httpx.TransportError):
            assert status(server, "/readyz") == 503
        assert server.terminate(30) == 0
