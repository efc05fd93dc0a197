"""Where embeddings may be pushed: private and loopback addresses, and what the operator allows beside them."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from encode_server.errors import BadRequest, DeliveryFailed, Forbidden, StartupError
from encode_server.media.addresses import is_metadata, is_private, parse_address
from encode_server.runtime.resolving import Resolver

LOOK_UPS = 64  # concurrently
CLIENT_SHARE = 0.25  # of them

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class DestinationPolicy:
    """Resolves `prefill_host` once and checks what it resolves to.

    `allow`: networks (`203.0.113.0/24`, `2001:db8::1`) or host names beside private and loopback addresses.
    Raises StartupError when an entry is neither.
    """

    def __init__(self, allow: Sequence[str]) -> None:
        self._resolver = Resolver(LOOK_UPS, CLIENT_SHARE)
        self._networks: list[Network] = []
        self._names: set[str] = set()
        for entry in allow:
            try:
                self._networks.append(ipaddress.ip_network(entry, strict=False))
            except ValueError:
                if "/" in entry or not entry.replace("-", "").replace(".", "").isalnum():
                    raise StartupError(f"--destination-allow: {entry!r} is neither a network nor a host name") from None
                self._names.add(entry.lower().rstrip("."))

    async def endpoint(self, host: str, port: int, field: str = "prefill_host", client: str = "") -> str:
        """`tcp://address:port` of an allowed destination, its name resolved once. `field`: what messages call it.
        `client`: who asks, for fairness.

        Raises BadRequest for a port out of range, DeliveryFailed for an unknown host, Forbidden for one not allowed.
        """
        return (await self.endpoints(host, [port], field, client))[0]

    async def endpoints(
        self, host: str, ports: Sequence[int], field: str = "prefill_host", client: str = ""
    ) -> list[str]:
        """`endpoint` for several ports of one host, the name resolved once for all."""
        for port in ports:
            if not 0 < port < 65536:
                raise BadRequest(f"the port beside {field} is {port}, expected 1 to 65535")
        # IPv4 first: a name of this host listens there more often.
        address = min(await self.addresses(host, field, client), key=lambda a: ":" in a)
        return [f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}" for port in ports]

    async def addresses(self, host: str, field: str = "prefill_host", client: str = "") -> list[str]:
        """The allowed addresses of a host, at least one. Raises as `endpoint` does."""
        plain = host.strip("[]")
        try:
            found = [str(parse_address(plain))]  # no look-up: a silent name server delays names alone
        except ValueError:
            try:
                found = await self._resolver.look_up(plain, 0, client)
            except (OSError, UnicodeError, ValueError):
                raise DeliveryFailed(f"{field} {host!r} is not known") from None
        allowed = [address for address in found if self._allowed(host, address)]
        if not allowed:
            raise Forbidden(f"{field} {host!r} is not a destination this server may push to")
        return allowed

    def named(self, address: str) -> bool:
        """Whether the operator allowed this address explicitly."""
        return any(parse_address(address.partition("%")[0]) in network for network in self._networks)

    def _allowed(self, host: str, address: str) -> bool:
        ip = parse_address(address.partition("%")[0])
        if host.lower().rstrip(".") in self._names or any(ip in network for network in self._networks):
            return True
        if is_metadata(ip) or ip.is_link_local or ip.is_multicast or ip.is_unspecified:
            return False
        # The standard library's wider notion: networks of documentation and benchmarks are used inside as well.
        return ip.is_private or ip.is_loopback or is_private(ip)
