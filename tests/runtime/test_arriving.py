"""Downloads take the memory that they are charged, and no more."""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import uvloop

from encode_server.errors import BadMedia, TooLarge
from encode_server.media.limits import MediaLimits
from encode_server.media.sources import MediaSource
from encode_server.runtime.arriving import FIRST_BYTES, Arriving
from tests.media.web_server import web_server

MIB = 1 << 20


def test_what_arrives_is_kept_in_order() -> None:
    arriving, sent = Arriving(), b""
    assert arriving.take() == b""
    for size in (1, 2, FIRST_BYTES - 3, 1, 3 * FIRST_BYTES, 5):
        piece = bytes([size % 251]) * size
        arriving.append(piece)
        sent += piece
        assert len(arriving) == len(sent)
    assert arriving.take() == sent
    assert len(arriving) == 0 and arriving.take() == b""


def test_a_large_body_can_be_searched_where_it_lies() -> None:
    arriving, piece = Arriving(first_bytes=5 * FIRST_BYTES), bytes(FIRST_BYTES - 1) + b"x"
    for _ in range(200):
        arriving.append(piece)
    whole = arriving.whole()
    assert len(whole) == 200 * FIRST_BYTES and whole[:] == piece * 200
    assert whole.find(b"x", FIRST_BYTES) == 2 * FIRST_BYTES - 1
    view = memoryview(whole)
    arriving.close()
    assert len(arriving) == 0 and view[FIRST_BYTES - 1] == ord("x"), "who still looks at it may"


def test_connections_hold_little_beside_what_is_charged() -> None:
    """Of media servers that send as fast as they can, while the loop is busy with others."""
    charged = 0

    async def charge(nbytes: int) -> None:
        nonlocal charged
        charged += nbytes

    async def fetch() -> None:
        with web_server() as web, ThreadPoolExecutor(2) as pool:
            source = MediaSource(["127.0.0.1"], [], MediaLimits(fetch_seconds=1.5), pool)
            urls = [f"http://127.0.0.1:{web.port}/endless/{n}" for n in range(24)]
            tracemalloc.start()
            with contextlib.suppress(BadMedia, TooLarge):
                await asyncio.gather(*(source.fetch(url, charge) for url in urls))
            await source.aclose()

    try:
        uvloop.run(fetch())
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # What is charged lies in memory of its own, which is not traced.
    assert charged > 8 * MIB and most < 24 * MIB
