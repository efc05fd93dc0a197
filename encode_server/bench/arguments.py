"""The options of `encode-server bench` and `encode-server plan`, and how lists in them are read.

Apart, so that the command line starts fast.
"""

from __future__ import annotations

import argparse
from pathlib import Path

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
    parser.add_argument(
        "--mix", type=Path, metavar="FILE", help="TOML file that says what to send instead, see docs/sizing.md"
    )
    parser.add_argument("--items", type=int, default=1, metavar="N", help="media in one request [1]")
    parser.add_argument("--concurrency", default="1,8,32", metavar="N,…", help="requests in progress, in turn [1,8,32]")
    parser.add_argument("--rate", type=float, metavar="R", help="open loop instead: requests per second")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="measured time of each [10]")
    parser.add_argument("--warmup-s", type=float, default=2.0, metavar="S", help="unmeasured time before each [2]")
    parser.add_argument(
        "--objective-ms", type=float, metavar="MS", help="find the highest rate that is answered within MS, open loop"
    )
    parser.add_argument(
        "--percentile",
        type=float,
        default=99.0,
        metavar="P",
        help="of the requests that --objective-ms is held for [99]",
    )
    parser.add_argument("--precision", type=float, default=0.1, metavar="X", help="of the rate that is found [0.1]")
    parser.add_argument(
        "--api",
        choices=("encode", "chat"),
        default="encode",
        help="what is asked: /encode, or chats of one token, of SGLang or vLLM [encode]",
    )
    parser.add_argument("--model", default="default", metavar="NAME", help="the model that chats name [default]")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the rates and latencies: FILE.html or FILE.png")
    parser.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    parser.add_argument("--json", metavar="FILE", help="write the results there; - for standard output")


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `encode-server plan`."""
    parser.add_argument(
        "bench", type=Path, metavar="FILE", help="JSON of `encode-server bench --objective-ms … --json`"
    )
    parser.add_argument("--rate", type=float, required=True, metavar="R", help="requests per second to plan for")
    parser.add_argument("--mix", type=Path, metavar="FILE", help="TOML file of what is sent [as in the bench]")
    parser.add_argument("--objective-ms", type=float, metavar="MS", help="the objective [the bench's]")
    parser.add_argument(
        "--percentile", type=float, metavar="P", help="of the requests that it is held for [the bench's]"
    )
    parser.add_argument("--hit-rate", type=float, metavar="X", help="part that the cache answers [the mix's repeat]")
    parser.add_argument("--headroom", type=float, default=0.2, metavar="X", help="part of each server left free [0.2]")
    parser.add_argument("--cores", type=int, metavar="N", help="cores of each server [the bench's]")
    parser.add_argument("--threads", type=int, metavar="N", help="preparers' threads of each server [the bench's]")
    parser.add_argument("--price", type=float, default=1.0, metavar="P", help="of a server for an hour [1]")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="S", help="simulated time of each rate [20]")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="cost and latency up to 10,000 items/s: .html or .png"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there")


def integers(text: str) -> list[int]:
    """`1,8,32` as numbers, each above zero. Raises StartupError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise StartupError(f"got {text!r}, takes numbers above zero with commas between them")
    return [int(part) for part in parts]
