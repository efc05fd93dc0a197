"""Honest load beside strangers who try everything, within a limit of memory: `-m soak`, `SOAK_S` seconds (600)."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import httpx
import pytest

from encode_server.memory import worst_case
from encode_server.settings import load_settings
from tests.live import CPU, LiveServer, eventually
from tests.media.web_server import web_server
from tests.security.attackers import ATTACKS, attacked, listener_of_nothing, media_server
from tests.security.requests import item

OPTIONS = {
    "max_inflight_mb": "512",
    "undelivered_mb": "128",
    "max_answer_mb": "64",
    "cache_gb": "0.25",
    "arena_mb": "256",
    "preproc_processes": "1",
    "preproc_memory_mb": "1536",
    "max_connections": "512",
    "send_timeout_s": "5",
}
HONEST = "127.0.0.2"
GROUPS = Path("/sys/fs/cgroup")


def _honest(base_url: str, seconds: float, seed: int) -> tuple[list[float], list[str]]:
    """One request after the other, from an address of its own: how long each took, and what was refused."""
    took, lost = [], []
    ends = time.monotonic() + seconds
    transport = httpx.HTTPTransport(local_address=HONEST)
    with httpx.Client(transport=transport, timeout=30) as client:
        number = 0
        while time.monotonic() < ends:
            number += 1
            image = item(56 + number % 50, 56 + number // 50 % 50, seed + number // 2500)  # no image comes again
            fields = {"modality": "image", "mm_items": [image]}
            began = time.monotonic()
            answer = client.post(base_url + "/encode", json=fields)
            took.append(time.monotonic() - began)
            if answer.status_code != 200:
                lost.append(answer.text)
            time.sleep(0.02)
    return took, lost


def honest(server: LiveServer, seconds: float, seed: int) -> tuple[list[float], list[str]]:
    """`_honest` in a process of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_honest, (server.base_url, seconds, seed))


def p99(took: list[float]) -> float:
    return statistics.quantiles(took, n=100)[98]


@contextlib.contextmanager
def memory_group(nbytes: int) -> Iterator[Path | None]:
    """A control group with a limit of memory, where this process may make one."""
    version2 = (GROUPS / "cgroup.controllers").exists()
    group = (GROUPS if version2 else GROUPS / "memory") / f"soak-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.max" if version2 else "memory.limit_in_bytes")).write_text(str(nbytes))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        yield None
        return
    try:
        yield group
    finally:
        assert eventually(lambda: not (group / "cgroup.procs").read_text(), 30)
        group.rmdir()


def killed(group: Path) -> int:
    """How many processes the kernel ended for want of memory."""
    events = group / "memory.events"
    text = (events if events.exists() else group / "memory.oom_control").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("oom_kill "))


@contextlib.contextmanager
def limited_server(checkpoint: Path, tmp: Path, nbytes: int, *options: str) -> Iterator[tuple[LiveServer, Path | None]]:
    """A server that, with its processes, has so much memory; without control groups, each process has so much."""
    serve = [sys.executable, "-m", "encode_server.cli", "serve", str(checkpoint), *CPU, *options]
    with memory_group(nbytes) as group:
        first = f"ulimit -v {nbytes >> 10}" if group is None else f"echo $$ > {group}/cgroup.procs"
        command = ["sh", "-c", f'{first} && exec "$@"', "sh", *serve]
        with LiveServer(checkpoint, tmp, command=command) as live:
            yield live.healthy(), group


def test_nobody_honest_is_lost_beside_strangers(server):
    """For a moment. How long requests take is measured by `-m soak`."""
    with web_server() as web, attacked(int(server.base_url.rpartition(":")[2]), web.port):
        took, lost = honest(server, 2, 1)
    assert took and not lost, lost[:3]
    assert server.process.poll() is None
    assert httpx.get(server.base_url + "/livez", timeout=30).status_code == 200


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_honest_clients_beside_strangers(checkpoint, tmp_path):
    seconds = float(os.environ.get("SOAK_S", "600"))
    only = [name for name in os.environ.get("SOAK_ONLY", "").split(",") if name] or list(ATTACKS)
    bound = sum(part.nbytes for part in worst_case(load_settings(OPTIONS))) // 2
    options = [text for name, value in OPTIONS.items() for text in ("--" + name.replace("_", "-"), value)]
    options += ["--media-allow", "127.0.0.1"]
    with media_server() as media_port, limited_server(checkpoint, tmp_path / "s", bound, *options) as (server, group):
        port = int(server.base_url.rpartition(":")[2])
        alone, lost_alone = honest(server, min(10, seconds / 4), 1000)
        with listener_of_nothing() as nothing, attacked(nothing, media_port, only):
            time.sleep(2)
            elsewhere, _ = honest(server, min(20, seconds / 4), 2000)
        with attacked(port, media_port, only):
            time.sleep(2)  # until they have been started: what that costs is not the server's
            beside, lost = honest(server, seconds, 3000)
        used = (group / "memory.max_usage_in_bytes") if group is not None else None
        most = f"{int(used.read_text()) >> 20}" if used is not None and used.exists() else "?"
        print(
            f"\nhonest p99: {p99(alone) * 1000:.0f} ms alone, {p99(elsewhere) * 1000:.0f} ms while strangers attack "
            f"another listener on these cores, {p99(beside) * 1000:.0f} ms beside them; median "
            f"{statistics.median(alone) * 1000:.0f}, {statistics.median(elsewhere) * 1000:.0f}, "
            f"{statistics.median(beside) * 1000:.0f}; {len(beside)} requests, {len(lost)} lost; "
            f"at most {most} of {bound >> 20} MiB"
        )
        assert not lost and not lost_alone, (lost[:3], lost_alone[:3])
        assert server.process.poll() is None
        assert "Traceback" not in server.log, "a fault of ours"
        assert group is None or not killed(group)
        assert httpx.get(server.base_url + "/livez", timeout=30).status_code == 200
        assert p99(beside) < 2 * max(p99(alone), p99(elsewhere))
