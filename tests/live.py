"""A real server process for the tests, and a look at what it leaves behind."""

from __future__ import annotations

import os
import re
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

CPU = ("--port", "0", "--device", "cpu", "--dtype", "float32")

TORCH = {"TORCHINDUCTOR_CACHE_DIR": tempfile.gettempdir()}  # torch makes one when imported, and leaves it


class LiveServer:
    """`encode-server serve MODEL …` in a process of its own, its temporary files in a directory of its own."""

    def __init__(
        self,
        model: str | Path,
        tmp: Path,
        *options: str,
        command: list[str] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.tmp = tmp
        tmp.mkdir(parents=True, exist_ok=True)
        self.lines: list[str] = []
        environment = (
            os.environ
            | (environment or {})
            | TORCH
            | {"TMPDIR": str(tmp), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        )
        self.process = subprocess.Popen(
            command or [sys.executable, "-m", "encode_server.cli", "serve", str(model), *CPU, *options],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.base_url = ""
        self.verify: ssl.SSLContext | bool = True  # the certificate to trust, of a server with TLS

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill_all()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_for_log(self, pattern: str, timeout: float = 120) -> re.Match[str]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.log):
                return found
            if self.process.poll() is not None:
                self._reader.join(5)
                if found := re.search(pattern, self.log):
                    return found
                break
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} not in the server's log:\n{self.log}")

    def listening(self) -> LiveServer:
        """Wait until it accepts connections (it may still be loading)."""
        self.base_url = self.wait_for_log(r"serving .* on (https?://\S+:\d+)")[1]
        while True:
            try:
                httpx.get(self.base_url + "/livez", timeout=5, verify=self.verify)
                return self
            except httpx.TransportError:
                assert self.process.poll() is None, self.log
                time.sleep(0.02)

    def healthy(self, timeout: float = 120) -> LiveServer:
        """Wait until it takes requests, that is, has encoded every modality."""
        self.listening()
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                if httpx.get(self.base_url + "/readyz", timeout=10, verify=self.verify).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            if self.process.poll() is not None:
                self._reader.join(5)
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log}")
            time.sleep(0.05)
        raise AssertionError(f"not healthy after {timeout} s:\n{self.log}")

    def metric(self, series: str) -> float:
        """The value of one series of `/metrics`: its name, with all its labels as they stand there."""
        lines = httpx.get(self.base_url + "/metrics", timeout=30, verify=self.verify).text.splitlines()
        values = [line.rpartition(" ")[2] for line in lines if line.rpartition(" ")[0] == series]
        assert len(values) == 1, f"{series} is {len(values)} times in /metrics"
        return float(values[0])

    def rank_pids(self) -> list[int]:
        """The rank processes that exist, in the order of their ranks."""
        return self._named("rank ")

    def preparer_pids(self) -> list[int]:
        """The preparer processes that exist."""
        return self._named("preparer ")

    def forkserver_pid(self) -> int:
        (pid,) = self._named("forkserver")
        return pid

    def _named(self, prefix: str) -> list[int]:
        mine = [pid for pid in _pids() if f"TMPDIR={self.tmp}\0" in _environment(pid)]
        return sorted((pid for pid in mine if _name(pid).startswith(prefix)), key=_name)

    def front_pid(self) -> int:
        return self.process.pid

    def leftovers(self) -> list[str]:
        """Processes and files that should be gone when the server is."""
        processes = [f"process {p}: {_cmdline(p)}" for p in _pids() if f"TMPDIR={self.tmp}\0" in _environment(p)]
        return processes + [str(path) for path in self.tmp.rglob("*")]

    def terminate(self, timeout: float = 60) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill_all(self) -> None:
        self.process.kill()  # everything else ends with the front
        self.process.wait(10)
        self._reader.join(5)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)


def eventually(condition, timeout: float = 60.0) -> bool:
    """Whether the condition comes true in time."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


def _pids() -> list[int]:
    return [
        int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and int(entry.name) != os.getpid()
    ]


def _environment(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return ""


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""
