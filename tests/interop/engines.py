"""Real SGLang servers and ours, as processes."""

from __future__ import annotations

import base64
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import httpx
import platformdirs

HERE = Path(__file__).parent
AV_LIBRARIES = Path(av.__file__).parent.parent / "av.libs"
START_S = 600  # a loaded machine with two cores takes minutes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ffmpeg_libraries(directory: Path) -> Path:
    """PyAV's FFmpeg under the names that SGLang's torchcodec looks for: not every machine has one installed."""
    if not directory.exists():
        directory.mkdir()
        for library in AV_LIBRARIES.glob("lib*"):
            if name := re.match(r"(libav\w+|libsw\w+)-[0-9a-f]+\.so\.(\d+)", library.name):
                (directory / f"{name[1]}.so.{name[2]}").symlink_to(library)
    return directory


class Engine:
    """A server in a process group of its own, its output in a file."""

    def __init__(self, command: list[str], port: int, log: Path, **variables: str) -> None:
        self.url, self.log = f"http://127.0.0.1:{port}", log
        venv = os.environ.get("SGLANG_VENV") or str(platformdirs.user_cache_path("encode-server") / "sglang-0.5.23")
        environment = os.environ | {"SGLANG_VENV": venv, "HF_HUB_OFFLINE": "1"} | variables
        environment["LD_LIBRARY_PATH"] = f"{ffmpeg_libraries(log.parent / 'ffmpeg')}:{AV_LIBRARIES}"
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, whatever it thinks of that."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            pass
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(15)

    def answering(self, path: str) -> Engine:
        """Wait until GET `path` is 200."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"it ended:\n{self.log.read_text(errors='replace')[-4000:]}"
            try:
                if httpx.get(self.url + path, timeout=30).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"no 200 from {path}:\n{self.log.read_text(errors='replace')[-4000:]}")


class Prefill(Engine):
    """SGLang without an encoder, its bootstrap server beside it."""

    def __init__(self, checkpoint: Path, log: Path, *, tp: int = 1, backend: str = "zmq_to_scheduler") -> None:
        port, self.bootstrap_port = free_port(), free_port()
        super().__init__(
            _sglang(checkpoint, backend, port, "--language-only", "--encoder-bootstrap-port", str(self.bootstrap_port))
            + f"--max-total-tokens 4096 --tp {tp}".split()
            + (["--skip-server-warmup"] if backend == "mooncake" else []),
            port,
            log,
            # Several ranks on one NUMA node have to be told their cores.
            **({"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(rank) for rank in range(tp))} if tp > 1 else {}),
        )
        self.bootstrap = f"http://127.0.0.1:{self.bootstrap_port}"

    def encoders(self) -> list[str]:
        return httpx.get(self.bootstrap + "/list_encoder_urls", timeout=30).json()["encoder_urls"]

    def with_encoders(self, count: int) -> None:
        """Wait until so many are registered."""
        deadline = time.monotonic() + START_S
        while len(self.encoders()) != count:
            assert time.monotonic() < deadline, self.encoders()
            time.sleep(0.5)

    def ask(self, *media: dict) -> httpx.Response:
        """A chat about the media; greedy, eight tokens, with log-probabilities."""
        body = {
            "model": "m",
            "max_tokens": 8,
            "temperature": 0,
            "logprobs": True,
            "messages": [{"role": "user", "content": [*media, {"type": "text", "text": "hello"}]}],
        }
        return httpx.post(self.url + "/v1/chat/completions", json=body, timeout=900)


def sglang_encoder(checkpoint: Path, log: Path, bootstrap: str, backend: str = "zmq_to_scheduler") -> Engine:
    """SGLang's own encoder."""
    port = free_port()
    return Engine(_sglang(checkpoint, backend, port, "--encoder-only", "--encoder-register-urls", bootstrap), port, log)


def our_encoder(checkpoint: Path, log: Path, bootstrap: str, *options: str) -> Engine:
    """Ours."""
    port = free_port()
    command = [sys.executable, "-m", "encode_server.cli", "serve", str(checkpoint), "--register-url", bootstrap]
    given = f"--protocol sglang --device cpu --dtype float32 --port {port}".split()
    return Engine([*command, *given, *options], port, log)


def _sglang(checkpoint: Path, backend: str, port: int, *options: str) -> list[str]:
    where = ["--model-path", str(checkpoint), "--port", str(port), "--encoder-transfer-backend", backend]
    return [str(HERE / "sglang_cpu.sh"), *where, *options]


def image(png: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": _uri(png, "image/png")}}


def video(mp4: bytes) -> dict:
    return {"type": "video_url", "video_url": {"url": _uri(mp4, "video/mp4")}}


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
