"""The options of `encode-server bench`, and how lists in them are read. Apart, so that the command line starts fast."""

from __future__ import annotations

import argparse

from encode_server.errors import StartupError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `encode-server bench`."""
    parser.add_argument("url", metavar="URL", help="the server, e.g. http://127.0.0.1:30000")
    parser.add_argument(
        "--media",
        default="448",
        metavar="A,B,…",
        help="what to send: sides of square JPEGs in pixels, video, audio; of several a random one each time [448]",
    )
    parser.add_argument("--items", type=int, default=1, metavar="N", help="media in one request [1]")
    parser.add_argument("--concurrency", default="1,8,32", metavar="N,…", help="requests in progress, in turn [1,8,32]")
    parser.add_argument("--rate", type=float, metavar="R", help="open loop instead: requests per second")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="measured time of each [10]")
    parser.add_argument("--warmup-s", type=float, default=2.0, metavar="S", help="unmeasured time before each [2]")
    parser.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    parser.add_argument("--json", metavar="FILE", help="write the results there; - for standard output")


def integers(text: str) -> list[int]:
    """`1,8,32` as numbers, each above zero. Raises StartupError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise StartupError(f"got {text!r}, takes numbers above zero with commas between them")
    return [int(part) for part in parts]
