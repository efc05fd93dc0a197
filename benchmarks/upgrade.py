"""A rolling upgrade of a fleet under load: three servers behind `encode-server route`, one after another drained and
replaced, again and again, while `encode-server bench` sends chats.

`python -m benchmarks.upgrade [--minutes 10] [--rate 5] [--json FILE]`. The servers run the demo on CPU cores. The
upgraded server has another option. A stand-in takes the engine's place, and refuses a chat unless each embedding lies
in the store. Prints a log; the exit status is 1 when a chat failed, a server left with another status than 0, or no
server was upgraded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.processes import ServerProcess, free_port
from encode_server.delivery.folder import ENTRY

SERVERS = 3
DRAIN_S = 3.0
KNOWN_S = 30.0  # for `route` to notice that a server is well: its probes are up to 5 s apart
LAST_S = 30.0  # before the load ends: no server is taken out any more
OPTION = "cache_gb"  # what an upgrade changes
VERSIONS = ("0.25", "0.5")


class Engine(ThreadingHTTPServer):
    """A stand-in for vLLM: answers a chat when the embedding of each of its media lies in `store`, with 424 else."""

    daemon_threads = True

    def __init__(self, store: Path) -> None:
        self.store = store
        self.chats = 0
        super().__init__(("127.0.0.1", 0), _Chats)

    @property
    def url(self) -> str:
        """Where `route` finds it."""
        return f"http://127.0.0.1:{self.server_port}"


class _Chats(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Engine

    def do_GET(self) -> None:
        """`/health`, and the list of models."""
        self._answer(200, {"data": []})

    def do_POST(self) -> None:
        """A chat."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/chat/completions"):
            self._answer(404, {})
            return
        parts = [part for message in body["messages"] for part in message["content"] if "uuid" in part]
        whole = bool(parts) and all((self.server.store / part["uuid"] / ENTRY).exists() for part in parts)
        self.server.chats += whole
        self._answer(200 if whole else 424, {"choices": [{"message": {"content": "yes"}}]})

    def _answer(self, status: int, document: object) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@dataclass
class Upgrade:
    """One server's. Times in seconds: from SIGTERM to the end, from the command to readiness."""

    server: int
    left_s: float
    status: int
    ready_s: float


@dataclass
class Fleet:
    """The servers, and `route` before them."""

    store: Path
    rate: float
    console: Console
    started: float = field(default_factory=time.perf_counter)
    servers: list[ServerProcess] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    upgrades: list[Upgrade] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line of the log."""
        minutes, seconds = divmod(int(time.perf_counter() - self.started), 60)
        self.console.print(f"{minutes:02}:{seconds:02}  {text}", highlight=False, markup=False)

    def start(self, port: int, version: str) -> ServerProcess:
        """A server that is ready."""
        options = ["--device=cpu", f"--drain-s={DRAIN_S}", f"--ec-store={self.store}", "--log-level=warning"]
        options.append(f"--{OPTION.replace('_', '-')}={version}")
        return ServerProcess(["encode_server.cli", "serve", "demo", *options], threads=1, port=port)

    def upgrade(self, index: int) -> None:
        """Drain and end a server, and start its successor in the same place."""
        old = self.servers[index]
        old.stop()
        version = next(version for version in VERSIONS if version != self.versions[index])
        self.servers[index] = new = self.start(old.port, version)
        self.versions[index] = version
        found = Upgrade(index, old.stop_s, old.process.returncode, new.start_s)
        self.upgrades.append(found)
        self.say(
            f"server {index}: left {found.left_s:.1f} s after SIGTERM with status {found.status}; "
            f"its successor, --{OPTION.replace('_', '-')} {version}, was ready after {found.ready_s:.1f} s"
        )
        old.close()

    def runs(self, index: int) -> bool:
        """Whether the server runs with the option of its version, by its own account."""
        document = get(self.servers[index].url + "/server_info")
        return float(document["settings"][OPTION]) == float(self.versions[index])


@contextlib.contextmanager
def fleet(rate: float, console: Console) -> Iterator[tuple[Fleet, ServerProcess, Engine]]:
    """The servers, `route`, and the engine's stand-in, ended after the block."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        made = Fleet(Path(folder), rate, console)
        stack.callback(lambda: [server.close() for server in made.servers])
        for _ in range(SERVERS):
            made.servers.append(made.start(free_port(), VERSIONS[0]))
            made.versions.append(VERSIONS[0])
        engine = stack.enter_context(Engine(made.store))
        threading.Thread(target=engine.serve_forever, daemon=True).start()
        stack.callback(engine.shutdown)
        urls = [f"--encoder-url={server.url}" for server in made.servers]
        command = ["encode_server.cli", "route", f"--engine-url={engine.url}", *urls, "--log-level=error"]
        route = ServerProcess(command)
        stack.callback(route.close)
        yield made, route, engine


def get(url: str) -> dict[str, Any]:
    """The document at a URL, whatever its status says."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as answer:
        return dict(json.load(answer))


def until_known(route: ServerProcess) -> None:
    """Wait until `route` holds every server to be well. Raises RuntimeError."""
    deadline = time.perf_counter() + KNOWN_S
    while not all(get(route.url + "/readyz")["encoders"].values()):
        if time.perf_counter() > deadline:
            raise RuntimeError(f"the proxy did not notice within {KNOWN_S:g} s that all servers are well")
        time.sleep(0.2)


def run(minutes: float, rate: float, pause_s: float, console: Console) -> dict[str, Any]:
    """The exercise: what became of the chats, and of the servers."""
    with fleet(rate, console) as (servers, route, engine), tempfile.TemporaryDirectory() as folder:
        until_known(route)
        servers.started = time.perf_counter()
        seconds = minutes * 60
        report = Path(folder) / "bench.json"
        options = ["--api=chat", "--media=112,224", f"--rate={rate}", f"--seconds={seconds}", f"--json={report}"]
        command = [sys.executable, "-m", "encode_server.cli", "bench", route.url, "--warmup-s=0", *options]
        servers.say(f"{SERVERS} servers behind route; encode-server bench sends {rate:g} chats/s")
        bench = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            turn = 0
            while time.perf_counter() - servers.started < seconds - min(LAST_S, seconds / 4) and bench.poll() is None:
                time.sleep(pause_s)
                servers.upgrade(turn % SERVERS)
                until_known(route)
                turn += 1
            _, said = bench.communicate(timeout=seconds + 120)
        finally:
            bench.kill()
        if not report.exists():
            raise RuntimeError(f"the bench wrote nothing: {said.decode(errors='replace')[-1000:]}")
        (found,) = json.loads(report.read_text()).values()
        failed = found["requests"] - found["outcomes"].get("200", 0)
        servers.say(
            f"{found['requests']} chats, {failed} failed; "
            + ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in found["latency_s"].items())
        )
        return {
            "minutes": minutes,
            "rate": rate,
            "requests": found["requests"],
            "failed": failed,
            "errors": found["errors"],
            "latency_s": found["latency_s"],
            "chats_with_embeddings": engine.chats,
            "upgrades": [vars(upgrade) for upgrade in servers.upgrades],
            "as_configured": all(servers.runs(index) for index in range(SERVERS)),
        }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="benchmarks.upgrade", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="of load [10]")
    parser.add_argument("--rate", type=float, default=5.0, metavar="R", help="chats per second [5]")
    parser.add_argument("--pause-s", type=float, default=10.0, metavar="S", help="before each server's turn [10]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args()
    found = run(options.minutes, options.rate, options.pause_s, Console(width=120))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    clean = all(upgrade["status"] == 0 for upgrade in found["upgrades"])
    return 0 if found["upgrades"] and clean and found["as_configured"] and not found["failed"] else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server outlives the exercise
    sys.exit(main())
