"""Media at http(s) URLs, fetched from vetted addresses only."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Executor

import httpcore
import httpx

from encode_server import __version__
from encode_server.errors import BadMedia
from encode_server.media.addresses import Address, parse_address
from encode_server.media.limits import MediaLimits
from encode_server.media.network import MediaNetwork
from encode_server.media.patience import PatientNetwork, PatientStream
from encode_server.media.policy import UrlPolicy, refusal
from encode_server.runtime.arriving import Arriving
from encode_server.runtime.charge import Charge, free
from encode_server.runtime.resolving import Resolver as SystemResolver
from encode_server.runtime.slots import FairSlots
from encode_server.runtime.turns import Turns

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Takes host and port, gives its addresses as text. Raises `OSError` for a name that has none."""

_REDIRECTS = (301, 302, 303, 307, 308)
# Seconds to connect to one of several addresses of a host, so that a dead address leaves time for the next.
_CONNECT_SECONDS = 5.0
_NETWORK_ERRORS = (
    *(httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol),
    OSError,
)

MAX_FETCHES = 256  # concurrently: each has a socket, and perhaps a thread that looks a name up
CLIENT_SHARE = 0.5  # of them


class WebFetcher:
    """An HTTP client that never connects to an address that the policy refuses.

    The check is made where connections are made: a name is resolved once, all its addresses are checked, and the
    connection goes to one of them, while Host header and TLS verification keep the name. A second answer of the name
    server has no effect. Redirects are followed by hand, each through the same checks. Proxy variables of the
    environment are ignored.
    """

    def __init__(
        self,
        policy: UrlPolicy,
        limits: MediaLimits,
        executor: Executor,
        *,
        resolve: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
        network: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        """`executor` gives back the memory of downloads that fail; the threads stay their owner's. `resolve`,
        `ssl_context` and `network` replace the system's name resolution, certificates and sockets.
        """
        self._policy = policy
        self._limits = limits
        self._executor = executor
        self._places = FairSlots(MAX_FETCHES, CLIENT_SHARE)
        # As many threads as fetches: a name server that doesn't answer delays those alone who ask for its names.
        self._resolver = SystemResolver(MAX_FETCHES, limit_s=limits.fetch_seconds)
        self._turns = Turns()
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context or httpx.create_ssl_context(trust_env=False),
            max_connections=None,
            max_keepalive_connections=32,
            keepalive_expiry=10.0,
            network_backend=_VettedNetwork(
                policy,
                resolve or self._resolver.look_up,
                PatientNetwork(network or MediaNetwork(), self._turns),
            ),
        )

    async def get(self, text: str, charge: Charge = free, client: str = "") -> Arriving:
        """The body at the URL `text`, each piece charged before it is kept; taking it is left to a thread. `client`:
        who asks, for fairness.

        Raises `Forbidden` for a host that the policy refuses, first or after a redirect, `TooLarge` beyond
        `limits.max_bytes`, `BadMedia` for all else that keeps it from arriving within `limits.fetch_seconds`.
        """
        url = _parse(text)
        host = url.host
        try:
            async with self._places.hold(client), asyncio.timeout(self._limits.fetch_seconds):
                for _ in range(self._limits.redirects + 1):
                    host = url.host
                    answer = await self._get_once(url, charge)
                    if not isinstance(answer, httpx.URL):
                        return answer
                    url = answer
        except TimeoutError as error:
            raise BadMedia(
                f"the media from the host {host!r} did not arrive within {self._limits.fetch_seconds:g} s"
            ) from error
        except _NETWORK_ERRORS as error:
            raise BadMedia(f"the media cannot be fetched from the host {host!r}") from error
        raise BadMedia(f"the URL redirects more than {self._limits.redirects} times")

    async def aclose(self) -> None:
        """Close every connection. A fetch in progress fails."""
        await self._pool.aclose()

    async def _get_once(self, url: httpx.URL, charge: Charge) -> Arriving | httpx.URL:
        """One request: the body, or where the answer redirects to."""
        self._policy.check_host(url.raw_host.decode("ascii"), _port(url))
        seconds = self._limits.fetch_seconds
        async with self._pool.stream(
            "GET",
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=[
                (b"Host", url.netloc),
                (b"User-Agent", f"encode-server/{__version__}".encode()),
                (b"Accept", b"*/*"),
                # Bytes that grow on the way would escape the limit on bytes.
                (b"Accept-Encoding", b"identity"),
            ],
            extensions={"timeout": dict.fromkeys(("connect", "read", "write", "pool"), seconds)},
        ) as response:
            if isinstance(stream := response.extensions.get("network_stream"), PatientStream):
                stream.answered()
            headers = {name.lower(): value for name, value in response.headers}
            if response.status in _REDIRECTS and b"location" in headers:
                return _parse(headers[b"location"].decode("latin-1"), base=url)
            if response.status != 200:
                raise BadMedia(f"the host {url.host!r} answered {response.status}, expected 200")
            if headers.get(b"content-encoding", b"identity").lower() not in (b"identity", b""):
                raise BadMedia(f"the host {url.host!r} sent a compressed body, expected the media as they are")
            return await self._body(response, headers.get(b"content-length", b""), charge)

    async def _body(self, response: httpcore.Response, declared: bytes, charge: Charge) -> Arriving:
        if declared.isdigit():
            self._limits.check_bytes(int(declared[:20]))
        body = Arriving()
        parts = 0
        try:
            async for part in response.aiter_stream():
                self._limits.check_bytes(len(body) + len(part))
                await charge(len(part))
                body.append(part)
                parts += 1
                if parts % 32 == 0:
                    # Thousands of tiny chunks in one packet must not block the loop.
                    await self._turns.wait()
        except BaseException:
            # A request that fails ends all of its downloads: half a gigabyte given back here would block the loop.
            self._executor.submit(body.close)
            raise
        if not len(body):
            raise BadMedia("the URL gives an empty body")
        return body


class _VettedNetwork(httpcore.AsyncNetworkBackend):
    """Connects to addresses that the policy allows for the host, and to nothing else."""

    def __init__(self, policy: UrlPolicy, resolve: Resolver, network: httpcore.AsyncNetworkBackend) -> None:
        self._policy = policy
        self._resolve = resolve
        self._network = network

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._addresses(host, port)
        each = timeout if len(addresses) == 1 else min(timeout or _CONNECT_SECONDS, _CONNECT_SECONDS)
        failure: Exception = httpcore.ConnectError("no address")
        for address in addresses:
            try:
                return await self._network.connect_tcp(str(address), port, each, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def _addresses(self, host: str, port: int) -> list[Address]:
        address = self._policy.check_host(host, port)
        if address is not None:
            return [address]
        try:
            found = [parse_address(text) for text in await self._resolve(host, port)]
        except (OSError, UnicodeError) as error:
            raise BadMedia(f"the host {host!r} cannot be found") from error
        except ValueError as error:
            # A link-local address with its scope.
            raise refusal(host) from error
        for address in found:
            self._policy.check_address(host, port, address)
        return found


def _parse(text: str, base: httpx.URL | None = None) -> httpx.URL:
    try:
        url = base.join(text) if base is not None else httpx.URL(text)
        host = url.raw_host.decode("ascii")
        port = _port(url)
        _ = url.host  # raises for a name that is no punycode, which messages would read later
    except (httpx.InvalidURL, ValueError) as error:
        raise BadMedia("the URL is malformed") from error
    if url.scheme not in ("http", "https"):
        raise BadMedia("the URL redirects to another scheme, expected http or https")
    if not 0 < len(host) < 255 or not 0 < port < 65536 or not all(mark.isalnum() or mark in "-._:" for mark in host):
        raise BadMedia("the URL has no valid host")
    if url.userinfo:
        raise BadMedia("the URL holds a user name or password, expected none")
    return url


def _port(url: httpx.URL) -> int:
    if url.port is not None:
        return url.port
    return 443 if url.scheme == "https" else 80
