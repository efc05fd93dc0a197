"""A Ray cluster of several nodes on this host under load: nodes killed, a rolling update in the middle, nothing lost.

`uv run --extra ray python -m benchmarks.cluster [--minutes 5] [--fleet] [--choice least_loaded] [--json FILE]`. The
demo's encoder on each node; the same clients ask for images of a pool again and again, so that caches count. `--fleet`:
the same load on three servers behind `encode-server route`, one killed and started again every 20 s. Clients never try
again: what is not answered 200 is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import statistics
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.processes import ServerProcess
from encode_server.media.unique import jpeg

AT_A_TIME = 6
POOL = 120  # images that are asked for again and again
GIVE_UP_S = 120.0
PORT = 8123
SERVER = {"device": "cpu", "preproc_workers": 2, "arena_mb": 256, "rank_threads": 1, "log_level": "warning"}


@dataclass
class Tally:
    """What the clients saw."""

    seconds: list[float] = field(default_factory=list)
    cached: int = 0
    lost: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Counts, seconds and shares."""
        answered = len(self.seconds)
        return {
            "accepted": answered + len(self.lost),
            "delivered": answered,
            "lost": len(self.lost),
            "hit_rate": round(self.cached / max(1, answered), 3),
            "p50_s": round(statistics.median(self.seconds), 3) if answered else None,
            "p99_s": round(sorted(self.seconds)[int(0.99 * answered)], 3) if answered else None,
            "reasons": sorted(set(self.lost))[:5],
        }


class Encoders(Protocol):
    """What is under load."""

    url: str
    delivery: str | None  # `cache` where embeddings do not come back this way

    def kill(self) -> None:
        """End one encoder and all of its processes, as the loss of its machine would."""

    def replace(self) -> None:
        """Give back what was lost."""

    def update(self) -> None:
        """Replace every encoder by one with other options, as a release does. Returns when that is done."""

    def count(self) -> int:
        """Encoders that take requests."""

    def close(self) -> None:
        """End everything."""


class RayNodes:
    """A head with the door, and worker nodes with one encoder each."""

    url, delivery = f"http://127.0.0.1:{PORT}", None

    def __init__(self, choice: str, nodes: int, least: int) -> None:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        os.environ |= {"RAY_DEDUP_LOGS": "0", "HF_HUB_OFFLINE": "1"}
        self._choice, self._least, self._most, self._version = choice, least, nodes, 0
        head = {"num_cpus": 0, "resources": {"head": 1}, "include_dashboard": False, "object_store_memory": 100 << 20}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._add() for _ in range(nodes)]
        ray.init(address=self._cluster.address, log_to_driver=False)
        address = {"host": "127.0.0.1", "port": PORT, "location": "HeadOnly", "request_timeout_s": GIVE_UP_S}
        serve.start(http_options=address)
        self.update()

    def kill(self) -> None:
        node = self._nodes.pop(0)
        self._cluster.remove_node(node, allow_graceful=False)

    def replace(self) -> None:
        self._nodes.append(self._add())

    def update(self) -> None:
        from ray import serve

        from encode_server.cluster.application import Arguments, build

        self._version += 1
        arguments = Arguments.model_validate(
            {
                "model": "demo",
                "options": SERVER | {"cache_gb": 0.25 * self._version},
                "min_replicas": self._least,
                "max_replicas": self._most,
                "target_backlog_s": 0.1,
                "upscale_delay_s": 2,
                "downscale_delay_s": 20,
                "choice": self._choice,
                "door_resources": {"head": 0.01},
            }
        )
        serve.run(build(arguments))

    def count(self) -> int:
        from ray import serve

        (application,) = serve.status().applications.values()
        return int(application.deployments["Encoder"].replica_states.get("RUNNING", 0))

    def close(self) -> None:
        import ray
        from ray import serve

        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=100 << 20)


class Fleet:
    """Servers behind `encode-server route`, with which they register."""

    delivery = "cache"

    def __init__(self, choice: str, nodes: int) -> None:
        self._version = 1
        route = ["encode_server.cli", "route", "--protocol=sglang", f"--choice={choice}", "--log-level=warning"]
        self._route = ServerProcess(route, ready_path="/livez")
        self.url = self._route.url
        self._servers = [self._start() for _ in range(nodes)]

    def kill(self) -> None:
        killed = self._servers.pop(0)
        killed.process.kill()  # its other processes end with the front
        killed.close()

    def replace(self) -> None:
        self._servers.append(self._start())

    def update(self) -> None:
        self._version += 1
        for _ in range(len(self._servers)):
            self._servers.append(self._start())
            self._servers.pop(0).close()

    def count(self) -> int:
        return len(self._servers)

    def close(self) -> None:
        for process in (*self._servers, self._route):
            process.close()

    def _start(self) -> ServerProcess:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in SERVER.items()]
        options += ["--protocol=sglang", f"--register-url={self.url}", f"--cache-gb={0.25 * self._version}"]
        return ServerProcess(["encode_server.cli", "serve", "demo", "--advertise-host=127.0.0.1", *options])


async def ask(under: Encoders, tally: Tally, pool: list[str], leaving: threading.Event, seed: int) -> None:
    """One client: one request after another, images of the pool, some far more often than others."""
    rng = random.Random(seed)
    async with httpx.AsyncClient(timeout=GIVE_UP_S) as client:
        while not leaving.is_set():
            item = pool[min(int(rng.paretovariate(0.6)), len(pool)) - 1]
            body = {"mm_items": [item], "modality": "image", "req_id": uuid4().hex, "delivery": under.delivery}
            began = time.monotonic()
            try:
                answer = await client.post(under.url + "/encode", json=body)
            except httpx.TransportError as error:
                tally.lost.append(type(error).__name__)
                continue
            if answer.status_code == 200:
                tally.seconds.append(time.monotonic() - began)
                tally.cached += answer.json()["items"][0]["cached"]
            else:
                tally.lost.append(f"{answer.status_code} {answer.text[:80]}")


def load(under: Encoders, seconds: float, kill_every_s: float, side: int, images: int) -> dict[str, Any]:
    """Clients for so long; encoders killed, and in the middle all of them replaced."""
    tally, leaving = Tally(), threading.Event()
    pool = [base64.b64encode(jpeg(side, side, seed).copy()).decode() for seed in range(images)]

    async def clients() -> None:
        await asyncio.gather(*(ask(under, tally, pool, leaving, seed) for seed in range(AT_A_TIME)))

    thread = threading.Thread(target=lambda: asyncio.run(clients()))  # Ray adds nodes in the main thread alone
    thread.start()
    began, killed, updated, most = time.monotonic(), 0, False, 0
    try:
        while (age := time.monotonic() - began) < seconds:
            if not updated and age > seconds / 2:
                under.update()
                updated = True
            elif age > (killed + 1) * kill_every_s:
                under.kill()
                killed += 1
                under.replace()
            time.sleep(0.5)
            most = max(most, under.count())
    finally:
        leaving.set()
        thread.join()
    return tally.summary() | {"killed": killed, "updated": updated, "most_encoders": most}


def main() -> int:
    """The exit status: 1 when a request was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--kill-every-s", type=float, default=20)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--least", type=int, default=2, help="replicas that there always are")
    parser.add_argument("--side", type=int, default=112, help="pixels a side of an image")
    parser.add_argument("--images", type=int, default=POOL, help="different images; some are asked for far more often")
    parser.add_argument(
        "--fleet", action="store_true", help="servers behind `encode-server route` instead of a cluster"
    )
    parser.add_argument("--choice", choices=["content", "least_loaded"], default="content")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    under: Encoders = (
        Fleet(options.choice, options.nodes)
        if options.fleet
        else RayNodes(options.choice, options.nodes, options.least)
    )
    try:
        found = load(under, 60 * options.minutes, options.kill_every_s, options.side, options.images)
        if not options.fleet:
            found["encoders_when_idle"] = _idle(under, options.least)
    finally:
        under.close()
    table = Table("what", "figure", title="route" if options.fleet else "Ray Serve")
    for name, value in found.items():
        table.add_row(name, str(value))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return int(bool(found["lost"]))


def _idle(under: Encoders, least: int) -> int:
    """Encoders that are left without load."""
    deadline = time.monotonic() + 60
    while under.count() > least and time.monotonic() < deadline:
        time.sleep(1)
    return under.count()


if __name__ == "__main__":
    sys.exit(main())
