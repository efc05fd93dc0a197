"""A real Ray cluster of this host: the one command, a replica that is killed under load, Ctrl-C."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.live import eventually
from tests.media.samples import picture

pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_killed_replica_costs_no_request(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--device", "cpu", "--rank-threads", "1", "--preproc-workers", "2", "--arena-mb", "256"]
    command = [sys.executable, "-m", "encode_server.cli", "serve", "demo", "--ray", "2", "--port", str(port), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "RAY_TMPDIR": "/tmp", "RAY_USAGE_STATS_ENABLED": "0"}
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, process_group=0)
    url = f"http://127.0.0.1:{port}"
    try:
        assert eventually(lambda: _healthy(url), 300), (tmp_path / "log").read_text()[-3000:]
        assert eventually(lambda: len(_replicas(url)) == 2, 60)
        statuses: list[int] = []
        leaving = threading.Event()

        def ask() -> None:
            with httpx.Client(timeout=120) as client:
                for seed in range(100_000):
                    if leaving.is_set():
                        return
                    image = io.BytesIO()
                    picture(56, 56, seed).save(image, "PNG")
                    form = {"f": ("f.png", image.getvalue())}
                    answer = client.post(url + "/encode", data={"modality": "image"}, files=form)
                    statuses.append(answer.status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        assert eventually(lambda: len(statuses) > 20, 60)
        killed = _replicas(url)[0]
        os.kill(int(killed.rpartition(":")[2]), signal.SIGKILL)
        before = len(statuses)
        assert eventually(lambda: killed not in (left := _replicas(url)) and len(left) == 2, 120)
        assert eventually(lambda: len(statuses) > before + 20, 60)
        leaving.set()
        thread.join()
        assert set(statuses) == {200}
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.wait()
        log.close()


def _healthy(url: str) -> bool:
    try:
        return httpx.get(url + "/health", timeout=30).status_code == 200
    except httpx.TransportError:
        time.sleep(0.5)
        return False


def _replicas(url: str) -> list[str]:
    """`HOST:PROCESS` of each replica, from the door's metrics."""
    try:
        lines = httpx.get(url + "/metrics", timeout=30).text.splitlines()
    except httpx.TransportError:
        return []
    label = 'encode_requests_in_progress{replica="'
    return sorted(line[len(label) :].partition('"')[0] for line in lines if line.startswith(label))
