"""Which encoders there are: those on a list, those behind a DNS name, and those that register themselves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import SplitResult

from encode_server.client.encoders import Encoders
from encode_server.delivery.destinations import DestinationPolicy
from encode_server.errors import BadRequest
from encode_server.runtime.urls import port_of, split_server_url

log = logging.getLogger(__name__)

RESOLVE_S = 5.0
FORGET_S = 600.0  # a registered encoder that has not been well for so long is forgotten, as SGLang's bootstrap does
MAX_REGISTERED = 1024


@dataclass
class _Registered:
    last_well: float  # of time.monotonic()


class Fleet:
    """Keeps `encoders` to the members that the three sources name.

    `dns`: URLs whose host names stand for all their addresses; a name that cannot be resolved keeps its last
    addresses. `policy`: which hosts may register: the key for encoders is sent to them.
    """

    def __init__(
        self, encoders: Encoders, listed: Sequence[str], dns: Sequence[str], policy: DestinationPolicy
    ) -> None:
        self._encoders, self._policy = encoders, policy
        self._listed = frozenset(url.rstrip("/") for url in listed)
        self._resolved: dict[str, frozenset[str]] = {url.rstrip("/"): frozenset() for url in dns}
        self._registered: dict[str, _Registered] = {}

    @property
    def registered(self) -> list[str]:
        """Encoders that registered themselves, by their URLs as they gave them."""
        return list(self._registered)

    async def register(self, url: str) -> None:
        """An encoder says where it is. Raises BadRequest, Forbidden, DeliveryFailed for a URL that cannot be used."""
        url = url.rstrip("/")
        if url not in self._registered:
            parts = split_url(url)
            await self._policy.endpoint(parts.hostname or "", port_of(parts), "the encoder's host")
            if len(self._registered) >= MAX_REGISTERED:
                raise BadRequest(f"{MAX_REGISTERED} encoders are registered, no more are taken")
            log.info("%s registered", url)
        self._registered[url] = _Registered(time.monotonic())
        self._encoders.add(url)

    def unregister(self, url: str) -> None:
        """An encoder leaves: it is given nothing new."""
        url = url.rstrip("/")
        if self._registered.pop(url, None) is not None:
            log.info("%s unregistered", url)
            self._reconcile()

    async def run(self) -> None:
        """Resolve names again and again, and forget registered encoders that are gone, until cancelled."""
        while True:
            for url in self._resolved:
                await self._resolve(url)
            self._forget()
            self._reconcile()
            await asyncio.sleep(RESOLVE_S)

    async def _resolve(self, url: str) -> None:
        parts = split_url(url)
        port = port_of(parts)
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: no host can have such a name
            if self._resolved[url]:
                log.warning("%s is not resolved, its last addresses stay: %s", parts.hostname, error)
            return
        addresses = {str(info[4][0]) for info in found}
        self._resolved[url] = frozenset(
            f"{parts.scheme}://[{a}]:{port}" if ":" in a else f"{parts.scheme}://{a}:{port}" for a in addresses
        )

    def _forget(self) -> None:
        now = time.monotonic()
        for encoder in self._encoders.all:
            if encoder.healthy and encoder.url in self._registered:
                self._registered[encoder.url].last_well = now
        for url, registered in list(self._registered.items()):
            if now - registered.last_well > FORGET_S:
                log.warning("%s has not been well for %g s: forgotten", url, FORGET_S)
                del self._registered[url]

    def _reconcile(self) -> None:
        wanted = self._listed.union(self._registered, *self._resolved.values())
        for encoder in self._encoders.all:
            if encoder.url not in wanted:
                self._encoders.remove(encoder.url)
        for url in wanted:
            self._encoders.add(url)


def split_url(url: str) -> SplitResult:
    """The parts of an encoder's URL. Raises BadRequest for what is not http://HOST:PORT."""
    with contextlib.suppress(ValueError):
        parts = split_server_url(url)
        if not (parts.path or parts.query or parts.fragment or "@" in parts.netloc):
            return parts
    raise BadRequest(f"{url[:300]!r} is not an encoder's URL, expected http://HOST:PORT")
