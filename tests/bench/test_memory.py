"""The benchmark of a server's start and memory: what it finds, never how much."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from benchmarks import memory, procfs
from tests.live import eventually


@pytest.mark.slow
def test_every_process_of_a_server_is_found(tmp_path, capsys):
    found = tmp_path / "found.json"
    assert memory.main(["--rounds=1", f"--json={found}"]) == 0
    (measured,) = json.loads(found.read_text())["servers"][memory.HERE]
    assert {"front", "forkserver", "rank 0", "preparer 0"} <= measured["processes"].keys()
    for held in measured["processes"].values():
        assert held["rss"] >= held["pss"] > 0 and held["rss"] >= held["private"]
    seconds = measured["seconds"]
    assert 0 < seconds["/livez"] <= seconds["/readyz"] <= seconds["/health"]
    printed = capsys.readouterr().out
    assert "preparer 0" in printed and "/livez" in printed


def test_a_checkout_without_an_environment_is_refused(tmp_path, capsys):
    assert memory.main([f"--against={tmp_path}"]) == 2
    assert "has no .venv/bin/python" in capsys.readouterr().err


def test_the_usage_of_a_process_without_children():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            assert eventually(lambda: procfs.usage(busy.pid).loop > 0, 30)
            found = procfs.usage(busy.pid)
            assert found.preparers == found.ranks == 0
            assert eventually(lambda: procfs.usage(busy.pid).since(found).front > 0, 30)
        finally:
            busy.kill()
