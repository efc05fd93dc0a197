"""Starting, stopping, dying: one clear line, the right exit status, nothing left behind."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.live import LiveServer, eventually

SERVE = [sys.executable, "-m", "encode_server.cli", "serve"]


def run(*arguments, **environment):
    return subprocess.run(
        arguments,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=90,
    )


def test_sigterm_ends_it_with_status_0_and_nothing_left(checkpoint, tmp_path):
    with LiveServer(checkpoint, tmp_path / "s", "--tp", "2") as server:
        server.healthy()
        assert len(server.rank_pids()) == 2
        assert server.terminate() == 0
        assert server.leftovers() == []


def test_sigterm_while_loading(checkpoint, tmp_path):
    with LiveServer(checkpoint, tmp_path / "s") as server:
        server.listening()
        assert server.terminate() == 0
        assert server.leftovers() == []


def test_sigkill_of_the_front_takes_its_ranks_along(checkpoint, tmp_path):
    with LiveServer(checkpoint, tmp_path / "s", "--tp", "2") as server:
        server.healthy()
        for pid in (server.front_pid(), *server.rank_pids()):
            assert "/dev/shm" not in Path(f"/proc/{pid}/maps").read_text()
        os.kill(server.front_pid(), signal.SIGKILL)
        server.process.wait(10)
        assert eventually(lambda: server.leftovers() == [])


def test_killed_while_loading_is_swept_by_the_next_start(checkpoint, tmp_path):
    left = []
    for _ in range(10):
        with LiveServer(checkpoint, tmp_path / "s") as server:
            server.wait_for_log("loading")
            while not left and not re.search("rank 0: ready", server.log):
                left = list((tmp_path / "s").glob("encode-server-*"))
            os.kill(server.front_pid(), signal.SIGKILL)
            server.process.wait(10)
            assert eventually(lambda server=server: not server.rank_pids())
            left = [path for path in left if path.exists()]
        if left:
            break
    assert left, "every server had loaded before it was killed"
    with LiveServer(checkpoint, tmp_path / "s") as again:
        again.listening()
        assert again.terminate() == 0
        assert again.leftovers() == []


def test_started_twice_on_one_port(checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run(*SERVE, str(checkpoint), "--port", str(taken.getsockname()[1]))
    assert result.returncode == 1
    assert re.fullmatch(r"encode-server: cannot listen on 127.0.0.1:\d+: address already in use\n", result.stderr)


def lines(result):
    return result.stderr.strip().splitlines()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["/no/such/model"], "no such directory"),
        (["{checkpoint}", "--tp", "3"], "tp 3 does not divide the 8 attention heads"),
        (["{checkpoint}", "--tp", "x"], "--tp: got 'x', takes an integer"),
        (["{checkpoint}", "--port", "99999"], "--port: got '99999', takes less than or equal to 65535"),
        (["{checkpoint}", "--device", "tpu"], "--device: got 'tpu', takes 'auto', 'cuda' or 'cpu'"),
        (["{checkpoint}", "--destination-allow", "not/a/net"], "--destination-allow"),
        (["{checkpoint}", "--media-allow", "!!"], "--media-allow"),
        (["{checkpoint}", "--api-keys", ","], "--api-keys: got"),
        (["{checkpoint}", "--media-roots", "/no/such/dir"], "--media-roots"),
    ],
)
def test_wrong_starts_are_one_line(checkpoint, arguments, says):
    given = [argument.format(checkpoint=checkpoint) for argument in arguments]
    result = run(*SERVE, "--port", "0", *given)  # a port given later wins
    assert result.returncode == 1
    assert says in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_an_unknown_hub_id_ends_the_server_with_one_line(checkpoint):
    """The hub is asked while the server listens already, so its log comes first."""
    result = run(*SERVE, "--port", "0", "someone/unknown-model")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert re.match("encode-server: model 'someone/unknown-model' is neither a directory nor", lines(result)[-1])


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ((), "1 GPU is"),
        pytest.param(("--dp", "2", "--tp", "2"), "4 GPUs are", marks=pytest.mark.slow),
    ],
)
def test_fewer_gpus_than_ranks_is_one_line(checkpoint, options, needed):
    result = run(*SERVE, str(checkpoint), "--device", "cuda", *options, "--port", "0", CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1] == (
        f"encode-server: {needed} needed, found 0 (CUDA_VISIBLE_DEVICES=): lower --dp or --tp, or set --device cpu"
    )


def test_checkpoint_without_its_weights_is_one_line(checkpoint, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    result = run(*SERVE, str(broken), "--port", "0")
    assert result.returncode == 1 and "safetensors" in result.stderr and result.stderr.count("\n") == 1


def test_uvicorn_command_with_environment(checkpoint, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ["ENCODE_SERVER_MODEL"] = str(checkpoint)
    try:
        command = [sys.executable, "-m", "uvicorn", "encode_server.app:app", "--port", str(port)]
        with LiveServer("", tmp_path / "s", command=command) as server:
            server.base_url = f"http://127.0.0.1:{port}"
            assert eventually(lambda: _status(server.base_url) == 200, 200), server.log
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(60)
            assert server.leftovers() == []
    finally:
        del os.environ["ENCODE_SERVER_MODEL"]


def test_uvicorn_workers_are_refused_with_the_reason():
    result = run(sys.executable, "-m", "uvicorn", "encode_server.app:app", "--workers", "2", "--port", "0")
    assert "each worker would load the model again" in result.stderr


def _status(base_url: str) -> int:
    try:
        return httpx.get(base_url + "/health", timeout=5).status_code
    except httpx.TransportError:
        return 0
