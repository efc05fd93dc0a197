"""What `encode-server demo` shows: one item of each modality, encoded over HTTP as a client would.

A process of its own, started by `demo`: the media are made with Pillow and PyAV, which a front does not import.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass

import httpx
from rich.console import Console
from rich.json import JSON
from rich.table import Table

from encode_server.client import EncodeClient
from encode_server.demo import SERVER_GONE
from encode_server.media import samples
from encode_server.wire.modality import Modality


@dataclass(frozen=True)
class _Sample:
    modality: Modality
    what: str
    media: bytes


def main() -> int:
    """Wait until the server is ready, encode, print; the exit status."""
    parser = argparse.ArgumentParser(prog="encode_server.tour")
    parser.add_argument("base_url")
    parser.add_argument("--once", action="store_true")
    args = parser.parse_args()
    console = Console()
    try:
        with console.status("loading the encoder"):
            _wait_ready(args.base_url)
        asyncio.run(_show(console, args.base_url))
    except Exception as error:
        if not _is_ready(args.base_url):
            return SERVER_GONE  # by Ctrl-C, say
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if not args.once:
        console.print(f"\nServing. POST media to [bold]{args.base_url}/encode[/bold], for example:")
        console.print(f"  curl -F modality=image -F file=@image.jpg {args.base_url}/encode", highlight=False)
        console.print("Ctrl-C ends it.")
    return 0


async def _show(console: Console, base_url: str) -> None:
    shown = (
        _Sample(Modality.IMAGE, "generated image", samples.picture()),
        _Sample(Modality.VIDEO, "generated clip", samples.clip()),
        _Sample(Modality.AUDIO, "generated audio", samples.sound()),
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
        console.print(table)
        console.print("GET /health")
        console.print(JSON.from_data((await client.health()).document))


def _wait_ready(base_url: str) -> None:
    """Returns when requests are taken. Raises httpx.TransportError when the server is gone."""
    while True:
        if httpx.get(f"{base_url}/readyz", timeout=5).status_code == 200:
            return
        time.sleep(0.1)


def _is_ready(base_url: str) -> bool:
    try:
        return httpx.get(f"{base_url}/readyz", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
