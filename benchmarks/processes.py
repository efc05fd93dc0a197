"""The processes that are measured: floors that obey, and servers that serve. Each is started fresh and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import procfs
from benchmarks.prometheus import Look
from encode_server.runtime.environment import forkserver_environment


class FloorProcess:
    """A `benchmarks.worker`. Idle, it waits on its standard input and costs nothing. Loads until `wait_ready`."""

    def __init__(self, kind: str, model: Path, device: str, dtype: str, threads: int) -> None:
        # Ours runs in the surroundings of a rank, transformers' in those that anybody has.
        options = [f"--kind={kind}", f"--model={model}", f"--device={device}", f"--dtype={dtype}"]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", *options, f"--threads={threads}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=(forkserver_environment() if kind == "ours" else {}) | _environment(threads),
        )

    def wait_ready(self) -> None:
        """Return once it has loaded; call it once, first."""
        self._answer()

    def do(self, operation: str, **arguments: Any) -> dict[str, Any]:
        """Have it done; the answer, which is `{"error": …}` when it could not be."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": operation, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the floor's process ended with status {self._process.wait()}")
        return dict(json.loads(line))


class ServerProcess:
    """A server under a port of 127.0.0.1, its own where `port` names none, ready for requests once constructed.

    `threads`: OMP_NUM_THREADS of the server, left alone when None, as for a user. `environment`: more variables for it.
    `checkout`: the directory of another checkout to run, with the Python of its own environment. `start_s`: seconds
    from the command to the first good answer of `ready_path`. `stop_s`: those from SIGTERM to its end, once closed.
    """

    def __init__(
        self,
        command: list[str],
        *,
        threads: int | None = None,
        ready_path: str = "/readyz",
        timeout_s: float = 900,
        environment: dict[str, str] | None = None,
        checkout: Path | None = None,
        port: int | None = None,
    ) -> None:
        self.port = port if port is not None else free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._started = time.perf_counter()
        python = checkout / ".venv" / "bin" / "python" if checkout else sys.executable
        self.process = subprocess.Popen(
            [python, "-m", *command, f"--port={self.port}"],
            stdout=self._log,
            stderr=self._log,
            env=_environment(threads) | (environment or {}),
            process_group=0,
            cwd=checkout,
        )
        try:
            self.start_s = self.wait(ready_path, timeout_s)
        except BaseException:
            self.close()
            raise
        self.stop_s = 0.0

    def wait(self, path: str, timeout_s: float = 900) -> float:
        """Wait until `path` answers 200; the seconds since the command was given. Raises RuntimeError when the server
        ends, or does not come so far in `timeout_s` seconds."""
        while (age := time.perf_counter() - self._started) < timeout_s:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with status {self.process.returncode}:\n{self.log()[-2000:]}")
            try:
                self._get(path)
                return time.perf_counter() - self._started
            except (urllib.error.URLError, OSError):
                time.sleep(0.02)
        raise RuntimeError(f"{path} did not answer 200 within {age:.0f} s")

    def log(self) -> str:
        """What it has written to its standard output and error so far. Call this method before `close`."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")

    def look(self) -> Look:
        """Its metrics now."""
        return Look.parse(self._get("/metrics").decode())

    def usage(self) -> procfs.Usage:
        """Its CPU time now, its ranks' included."""
        return procfs.usage(self.process.pid)

    def stop(self) -> None:
        """End it, politely at first. Its log can still be read."""
        if self.process.poll() is None:
            asked = time.perf_counter()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()  # its ranks die with it
                self.process.wait()
            self.stop_s = time.perf_counter() - asked

    def close(self) -> None:
        """End it, and drop its log."""
        self.stop()
        self._log.close()

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return bytes(answer.read())


@contextlib.contextmanager
def floor(kind: str, model: Path, device: str, dtype: str, threads: int) -> Iterator[FloorProcess]:
    """A floor, ended after the block."""
    process = FloorProcess(kind, model, device, dtype, threads)
    try:
        yield process
    finally:
        process.close()


@contextlib.contextmanager
def server(
    command: list[str],
    *,
    ready_path: str = "/readyz",
    timeout_s: float = 900,
    environment: dict[str, str] | None = None,
    checkout: Path | None = None,
) -> Iterator[ServerProcess]:
    """A server, ended after the block."""
    process = ServerProcess(
        command, ready_path=ready_path, timeout_s=timeout_s, environment=environment, checkout=checkout
    )
    try:
        yield process
    finally:
        process.close()


def free_port() -> int:
    """A port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(threads: int | None) -> dict[str, str]:
    limit = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | limit
