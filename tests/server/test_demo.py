"""`encode-server demo`: what a newcomer sees first."""

import os
import signal
import subprocess
import sys

import httpx
import pytest

from tests.live import TORCH, LiveServer

DEMO = [sys.executable, "-m", "encode_server.cli", "demo", "--port", "0", "--device", "cpu"]


def test_once_shows_the_table_and_leaves_nothing(tmp_path):
    tmp = tmp_path / "tmp"
    tmp.mkdir()
    result = subprocess.run(
        [*DEMO, "--once"],
        env=os.environ | TORCH | {"TMPDIR": str(tmp), "XDG_CACHE_HOME": str(tmp_path / "cache"), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert "weights are random" in result.stdout
    rows = [line for line in result.stdout.splitlines() if "×" in line and "generated" in line]
    assert [row.split("│")[1].strip() for row in rows] == ["image", "video", "audio"]
    assert '"status": "healthy"' in result.stdout
    assert list((tmp_path / "cache" / "encode-server").glob("demo-*/config.json"))  # an ordinary checkpoint
    assert not list(tmp.iterdir())


def test_it_serves_until_ctrl_c(tmp_path):
    with LiveServer("", tmp_path / "s", command=[*DEMO, "--log-level", "info"]) as demo:
        demo.healthy(200)
        assert httpx.get(demo.base_url + "/health", timeout=10).status_code == 200
        os.killpg(demo.process.pid, signal.SIGINT)  # as the terminal does
        assert demo.process.wait(60) == 0
        assert demo.leftovers() == []


@pytest.mark.slow
def test_the_demo_checkpoint_can_be_written_elsewhere(tmp_path):
    command = [sys.executable, "-m", "encode_server.cli", "demo-model"]
    written = subprocess.run([*command, str(tmp_path / "m")], capture_output=True, text=True, timeout=120)
    assert written.returncode == 0 and "random" in written.stdout
    assert (tmp_path / "m" / "model.safetensors").is_file()
    again = subprocess.run([*command, str(tmp_path / "m")], capture_output=True, text=True, timeout=120)
    assert again.returncode == 1 and again.stderr.count("\n") == 1
