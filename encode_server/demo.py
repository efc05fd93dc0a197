"""`encode-server demo`: serve the demo checkpoint, encode one of each modality over HTTP, show what came back."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from dataclasses import dataclass

import httpx
from rich.console import Console
from rich.json import JSON
from rich.table import Table

from encode_server.client import EncodeClient
from encode_server.errors import StartupError
from encode_server.media import samples
from encode_server.serve import serve
from encode_server.settings import Settings
from encode_server.wire.modality import Modality


@dataclass(frozen=True)
class _Sample:
    modality: Modality
    what: str
    media: bytes


def run_demo(settings: Settings, *, once: bool) -> int:
    """Serve, show it at work from a thread beside the server, go on until Ctrl-C (with `once`: end after the table).

    Raises StartupError when the server cannot start, or when the tour failed.
    """
    if "log_level" not in settings.model_fields_set:
        settings = settings.model_copy(update={"log_level": "warning"})
    tour = _Tour(Console(), once=once)
    status = serve(settings, on_listening=tour.start)
    if tour.failure:
        raise StartupError(f"the demo did not work: {tour.failure}")
    return status


class _Tour:
    """What the demo shows, run as a client would, over HTTP."""

    def __init__(self, console: Console, *, once: bool) -> None:
        self._console, self._once = console, once
        self.failure: str | None = None

    def start(self, base_url: str) -> None:
        """Begin, in a thread that does not keep the process alive."""
        self._console.print(
            f"Starting the demo checkpoint on {base_url}: a real architecture, its weights are [bold]random[/bold]."
        )
        threading.Thread(target=self._run, args=(base_url,), daemon=True).start()

    def _run(self, base_url: str) -> None:
        try:
            with self._console.status("loading the encoder"):
                _wait_ready(base_url)
            asyncio.run(self._show(base_url))
        except Exception as error:
            if not _is_ready(base_url):
                return  # it is being ended, by Ctrl-C say
            self.failure = f"{type(error).__name__}: {error}"
        if self._once or self.failure:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._console.print(f"\nServing. POST media to [bold]{base_url}/encode[/bold], for example:")
        self._console.print(f"  curl -F modality=image -F file=@picture.jpg {base_url}/encode", highlight=False)
        self._console.print("Ctrl-C ends it.")

    async def _show(self, base_url: str) -> None:
        shown = (
            _Sample(Modality.IMAGE, "generated picture", samples.picture()),
            _Sample(Modality.VIDEO, "generated clip", samples.clip()),
            _Sample(Modality.AUDIO, "generated sound", samples.sound()),
        )
        table = Table(title="What the encoder made of them")
        for column in ("modality", "input", "tokens × dim", "milliseconds"):
            table.add_column(column, justify="right" if column == "milliseconds" else "left")
        async with EncodeClient(base_url) as client:
            for sample in shown:
                started = time.perf_counter()
                embedding = await client.encode([sample.media], sample.modality)
                milliseconds = (time.perf_counter() - started) * 1000
                table.add_row(
                    sample.modality,
                    f"{sample.what}, {len(sample.media) / 1024:.1f} KiB",
                    "{} × {}".format(*embedding.shape),
                    f"{milliseconds:.1f}",
                )
            self._console.print(table)
            self._console.print("GET /health")
            self._console.print(JSON.from_data((await client.health()).document))


def _wait_ready(base_url: str) -> None:
    """Returns when requests are taken. The server itself ends the process when it cannot get there."""
    while not _is_ready(base_url):
        time.sleep(0.1)


def _is_ready(base_url: str) -> bool:
    try:
        return httpx.get(f"{base_url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
