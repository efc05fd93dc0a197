"""Tells SGLang's bootstrap servers where this encoder is, and keeps them told."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence

import httpx

from encode_server.errors import StartupError
from encode_server.runtime.urls import port_of, split_server_url

log = logging.getLogger(__name__)

CHECK_S = 5.0  # between looks at whether a bootstrap still knows us
FIRST_RETRY_S = 0.5
MAX_RETRY_S = 5.0
REQUEST_S = 3.0
WITHDRAW_S = 2.0


class Announcer:
    """Registers `own_url` with every bootstrap in `urls` while `ready()`, for as long as it runs.

    A bootstrap may come up later, or restart and forget us: it is asked every few seconds. `host`: by which others
    reach us; None is the address that this host has towards the bootstrap. Raises StartupError for what is no URL.
    """

    def __init__(self, urls: Sequence[str], scheme: str, host: str | None, ready: Callable[[], bool]) -> None:
        self._urls = [_checked(url) for url in urls]
        self._scheme, self._host, self._port, self._ready = scheme, host, 0, ready
        self._registered: dict[str, str] = {}  # what each bootstrap was told
        self._client = httpx.AsyncClient(timeout=REQUEST_S, trust_env=False)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, port: int) -> None:
        """Begin, in the background. `port`: by which others reach us."""
        self._port = port
        self._tasks = [asyncio.create_task(self._keep(url)) for url in self._urls]

    async def withdraw(self) -> None:
        """Unregister everywhere, within a short time; registers no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        told, self._registered = self._registered, {}
        await asyncio.gather(*(self._unregister(url, own) for url, own in told.items()))

    async def aclose(self) -> None:
        """Unregister if need be, and close the connections."""
        await self.withdraw()
        await self._client.aclose()

    async def _keep(self, bootstrap: str) -> None:
        delay = FIRST_RETRY_S
        while True:
            pause = FIRST_RETRY_S
            if self._ready():
                try:
                    await self._ensure(bootstrap)
                    pause = CHECK_S
                    delay = FIRST_RETRY_S
                except (httpx.HTTPError, OSError, ValueError, TypeError, KeyError) as error:
                    if delay == FIRST_RETRY_S:
                        log.warning("bootstrap %s not reached, trying on: %s", bootstrap, error or type(error).__name__)
                    pause = delay
                    delay = min(delay * 2, MAX_RETRY_S)
            await asyncio.sleep(pause)

    async def _ensure(self, bootstrap: str) -> None:
        """Register, unless the bootstrap already has us."""
        own = await self._own_url(bootstrap)
        if self._registered.get(bootstrap) == own:
            listed = await self._client.get(f"{bootstrap}/list_encoder_urls")
            if listed.is_success and own in listed.json()["encoder_urls"]:
                return
            log.warning("bootstrap %s does not list this encoder: registering again", bootstrap)
        # Noted first: an answer that gets lost must not keep us from unregistering.
        self._registered[bootstrap] = own
        (await self._client.post(f"{bootstrap}/register_encoder_url", json={"url": own})).raise_for_status()
        log.info("registered %s with bootstrap %s", own, bootstrap)

    async def _unregister(self, bootstrap: str, own: str) -> None:
        try:
            async with asyncio.timeout(WITHDRAW_S):
                await self._client.request("DELETE", f"{bootstrap}/unregister_encoder_url", json={"url": own})
            log.info("unregistered from bootstrap %s", bootstrap)
        except (httpx.HTTPError, TimeoutError) as error:
            log.warning("bootstrap %s not told that this encoder leaves: %s", bootstrap, error or type(error).__name__)

    async def _own_url(self, bootstrap: str) -> str:
        host = self._host or await _address_towards(bootstrap)
        return f"{self._scheme}://[{host}]:{self._port}" if ":" in host else f"{self._scheme}://{host}:{self._port}"


def advertised_host(advertise_host: str | None, listen_host: str) -> str | None:
    """The host to advertise, None where the server listens on all addresses."""
    if advertise_host:
        return advertise_host
    try:
        return None if ipaddress.ip_address(listen_host.strip("[]")).is_unspecified else listen_host.strip("[]")
    except ValueError:
        return listen_host


def _checked(url: str) -> str:
    try:
        split_server_url(url)
    except ValueError:
        raise StartupError(f"--register-url: got {url!r}, takes http://host:port") from None
    return url.rstrip("/")


async def _address_towards(url: str) -> str:
    """The address that packets from this host to the URL's carry; nothing is sent."""
    parts = split_server_url(url)
    found = await asyncio.get_running_loop().getaddrinfo(parts.hostname, port_of(parts), type=socket.SOCK_DGRAM)
    family, kind, proto, _, address = found[0]
    with socket.socket(family, kind, proto) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
