"""`encode-server demo`: serve the demo checkpoint, encode one of each modality over HTTP, show what came back."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import httpx
from rich.console import Console
from rich.json import JSON
from rich.table import Table

from encode_server import demo_media
from encode_server.client import EncodeClient
from encode_server.errors import StartupError
from encode_server.modality import Modality
from encode_server.serve import bind
from encode_server.settings import Settings, variable_name


@dataclass(frozen=True)
class _Sample:
    modality: Modality
    what: str
    media: bytes


def run_demo(settings: Settings, *, once: bool) -> int:
    """Start the server as its own process, show it at work, and serve until Ctrl-C (with `once`: end at once)."""
    console = Console()
    host, port = _free_address(settings)
    base_url = f"http://{host}:{port}"
    console.print(
        f"Starting the demo checkpoint on {base_url}: a real architecture, its weights are [bold]random[/bold]."
    )
    process = _start(settings, port)
    try:
        with console.status("loading the encoder"):
            _wait_healthy(base_url, process)
        asyncio.run(_show(console, base_url, settings))
        if once:
            return _stop(process)
        console.print(f"\nServing. POST media to [bold]{base_url}/encode[/bold], for example:")
        console.print(f"  curl -F modality=image -F file=@picture.jpg {base_url}/encode", highlight=False)
        console.print("Ctrl-C ends it.")
        return process.wait()
    except KeyboardInterrupt:
        return _stop(process)
    finally:
        if process.poll() is None:
            _stop(process)


def _free_address(settings: Settings) -> tuple[str, int]:
    """The address to serve on, known to be free, and a port chosen when it is 0."""
    with bind(settings.host, settings.port) as probe:
        port = int(probe.getsockname()[1])
    return ("127.0.0.1" if settings.host in ("0.0.0.0", "") else settings.host), port


def _start(settings: Settings, port: int) -> subprocess.Popen[bytes]:
    given = settings.model_dump(exclude_unset=True) | {"port": port, "model": settings.model}
    environment = {
        variable_name(name): ",".join(value) if isinstance(value, tuple) else str(value)
        for name, value in given.items()
        if value is not None
    }
    environment.setdefault(variable_name("log_level"), "warning")
    # A group of its own: Ctrl-C reaches this process alone, which passes it on once.
    return subprocess.Popen(
        [sys.executable, "-m", "encode_server.cli", "serve"], env=os.environ | environment, process_group=0
    )


def _wait_healthy(base_url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{base_url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise StartupError(f"the demo server ended with status {process.returncode}")


async def _show(console: Console, base_url: str, settings: Settings) -> None:
    samples = (
        _Sample(Modality.IMAGE, "generated picture", demo_media.picture()),
        _Sample(Modality.VIDEO, "generated clip", demo_media.clip()),
        _Sample(Modality.AUDIO, "generated sound", demo_media.sound()),
    )
    table = Table(title="What the encoder made of them")
    for column in ("modality", "input", "tokens × dim", "milliseconds"):
        table.add_column(column, justify="right" if column == "milliseconds" else "left")
    async with EncodeClient(base_url) as client:
        for sample in samples:
            started = time.perf_counter()
            embedding = await client.encode([sample.media], sample.modality)
            milliseconds = (time.perf_counter() - started) * 1000
            tokens, dim = embedding.shape
            table.add_row(
                sample.modality,
                f"{sample.what}, {len(sample.media) / 1024:.1f} KiB",
                f"{tokens} × {dim}",
                f"{milliseconds:.1f}",
            )
        console.print(table)
        console.print("GET /health")
        console.print(JSON.from_data((await client.health()).document))


def _stop(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
