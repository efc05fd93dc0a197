"""Names to addresses, in threads that nobody has to wait for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading

from encode_server.runtime.slots import FairSlots

RESOLVER_OPTIONS = "timeout:2 attempts:2"  # of the C library: its own would keep a thread up to 30 s


class Resolver:
    """Looks names up on at most `threads` threads, `share` of them for one client, each name within `limit_s` seconds.

    A look-up cannot be interrupted. Its thread is a daemon, so that neither a request nor the end of the process waits
    for a name server that says nothing; the thread counts until it has ended.
    """

    def __init__(self, threads: int, share: float = 1.0, limit_s: float = 5.0) -> None:
        self._slots = FairSlots(threads, share)
        self._limit_s = limit_s

    async def look_up(self, host: str, port: int, client: str = "") -> list[str]:
        """The addresses of `host`, each once. Raises OSError for a name that has none or is not found in time,
        UnicodeError for what can be no name."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._limit_s):
            await self._slots.acquire(client)
            found: asyncio.Future[list[str]] = loop.create_future()

            def done(addresses: list[str], error: Exception | None) -> None:
                self._slots.release(client)
                if found.done():
                    return
                if error is None:
                    found.set_result(addresses)
                else:
                    found.set_exception(error)

            def look() -> None:
                addresses: list[str] = []
                failure: Exception | None = None
                try:
                    entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
                except Exception as error:
                    failure = error
                with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                    loop.call_soon_threadsafe(done, addresses, failure)

            threading.Thread(target=look, name="resolve", daemon=True).start()
            return await found


def bound_look_ups() -> None:
    """Have the C library give up on silent name servers soon. Before the first look-up of the process; what the
    operator set stays."""
    os.environ.setdefault("RES_OPTIONS", RESOLVER_OPTIONS)
