"""A real Prometheus over a real server: it takes both formats, keeps the traces' ids, and the alerts fire."""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml

from encode_server.media.samples import noise
from tests.live import LiveServer, eventually

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian's package)"),
]
ROOT = Path(__file__).parents[2]
# As deployed, but for how long a condition must hold: minutes there, a second here.
RULES = yaml.safe_load((ROOT / "deploy/kubernetes/monitoring/prometheusrule.yaml").read_text())["spec"]
for _group in RULES["groups"]:
    for _rule in _group["rules"]:
        if _rule["alert"] == "EncodeServerRefuses":
            _rule["for"] = "1s"
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Prometheus:
    """A Prometheus that looks at one server each second."""

    def __init__(self, tmp: Path, target: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        scrape = {"job_name": "encode-server", "static_configs": [{"targets": [target.removeprefix("http://")]}]}
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [scrape],
        }
        (tmp / "prometheus.yaml").write_text(yaml.safe_dump(config))
        (tmp / "rules.yaml").write_text(yaml.safe_dump(RULES))
        self.url = f"http://{address}"
        self.log = (tmp / "prometheus.log").open("w")
        self.process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={tmp / 'prometheus.yaml'}",
                f"--storage.tsdb.path={tmp / 'data'}",
                f"--web.listen-address={address}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )

    def query(self, expression: str) -> list[dict[str, str]]:
        """The labels of each sample, none while it is not there yet."""
        try:
            answer = httpx.get(self.url + "/api/v1/query", params={"query": expression}, timeout=10)
        except httpx.TransportError:
            return []
        if answer.status_code == 503:  # it is starting
            return []
        return [sample["metric"] for sample in answer.json()["data"]["result"]]

    def exemplars(self, expression: str) -> list[str]:
        ago = {"query": expression, "start": 0, "end": 4_000_000_000}
        found = httpx.get(self.url + "/api/v1/query_exemplars", params=ago, timeout=10).json()["data"]
        return [exemplar["labels"]["trace_id"] for series in found for exemplar in series["exemplars"]]


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[tuple[LiveServer, Prometheus]]:
    store = ("--ec-store", str(tmp_path / "store"), "--ec-store-gb", "0.000001")  # a KiB: no embedding fits
    with LiveServer("demo", tmp_path / "s", "--max-requests", "1", *store) as server:
        server.healthy()
        prometheus = Prometheus(tmp_path, server.base_url)
        try:
            yield server, prometheus
        finally:
            prometheus.process.terminate()
            prometheus.process.wait(20)
            prometheus.log.close()


def encode(server: LiveServer) -> int:
    body = {"modality": "image", "mm_items": [base64.b64encode(noise(56, 56, 1)).decode()]}
    headers = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    return httpx.post(server.base_url + "/encode", json=body, headers=headers, timeout=60).status_code


def test_it_is_scraped_traced_and_alerts_when_its_ranks_are_lost(watched):
    server, prometheus = watched
    assert encode(server) == 200
    assert eventually(lambda: prometheus.query('up{job="encode-server"} == 1'), 30)
    duration = 'encode_request_duration_seconds_bucket{outcome="ok",modality="image",destination="answer"}'
    assert eventually(lambda: prometheus.exemplars(duration) == [TRACE], 30)
    assert eventually(lambda: prometheus.query("encode_requests_in_progress_limit == 1"), 10)
    for _ in range(2):
        (rank,) = server.rank_pids()
        os.kill(rank, signal.SIGKILL)
        assert eventually(lambda lost=rank: server.rank_pids() not in ([], [lost]), 60)
        server.healthy()
        assert encode(server) == 200
    firing = 'ALERTS{alertname="EncodeServerRanksLost",alertstate="firing"}'
    assert eventually(lambda: prometheus.query(firing), 60)
    assert [alert["cause"] for alert in prometheus.query(firing)] == ["died"]
    assert prometheus.query('ALERTS{alertname="EncodeServerStoreFull"}') == []


def test_it_alerts_when_requests_are_refused_and_when_the_store_is_full(watched):
    server, prometheus = watched
    assert eventually(lambda: prometheus.query('encode_refusals_total{bound="requests"} == 0'), 30)
    with ThreadPoolExecutor(8) as threads:
        outcomes = set(threads.map(lambda _: encode(server), range(80)))
    assert outcomes == {200, 429}
    stored = {"modality": "image", "delivery": "ec_store"}
    media = base64.b64encode(noise(56, 56, 2)).decode()
    body = stored | {"mm_items": [{"url": media, "uuid": "full"}]}
    assert httpx.post(server.base_url + "/encode", json=body, timeout=60).status_code == 507
    for alert, label in (("EncodeServerRefuses", 'bound="requests"'), ("EncodeServerStoreFull", "")):
        firing = f'ALERTS{{alertname="{alert}",alertstate="firing",{label}}}'
        assert eventually(lambda firing=firing: prometheus.query(firing), 60), alert
    assert prometheus.query('ALERTS{alertname="EncodeServerRanksLost"}') == []
