"""Which http(s) hosts media may be fetched from."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from encode_server.errors import Forbidden
from encode_server.media.addresses import Address, Network, is_private, is_public, looks_numeric, parse_address

_NAME = re.compile(r"(\*\.)?([a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.)*[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?")
_EXPECTED = "expected public, off, a domain name, *.domain, an address or a network, the last four also with :port"


@dataclass(frozen=True)
class _Rule:
    """One entry: exactly one of `public`, `network`, `name`, `suffix` is set; `port` None means every port."""

    public: bool = False
    network: Network | None = None
    name: str = ""
    suffix: str = ""
    port: int | None = None

    def may_match(self, host: str, port: int) -> bool:
        """False if no address could make this entry allow `host`."""
        if self.port is not None and port != self.port:
            return False
        if self.name:
            return host == self.name
        return not self.suffix or host.endswith(self.suffix)

    def allows(self, host: str, port: int, address: Address) -> bool:
        if not self.may_match(host, port):
            return False
        if self.network is not None:
            return address in self.network
        return is_public(address) or (bool(self.name) and is_private(address))


class UrlPolicy:
    """The allow-list for http(s) URLs. It is exhaustive: what no entry allows is refused.

    Entries, in any case:

    - `public`: every address of the public internet. An empty list means just this.
    - `off`: no http(s) URL at all. It must stand alone.
    - `10.0.0.0/8`, `127.0.0.1`, `fd00::/8`: addresses, public or not. The only way to a link-local address.
    - `media.internal`: a host by its exact name, at public, private and loopback addresses.
    - `*.example.com`: every name below a domain (not the domain itself), at public addresses; for private ones, name
      their network too, since others may own names below the domain.

    Each of the last three may end in `:port`, IPv6 in brackets then: `127.0.0.1:8000`, `[fd00::/8]:9000`.

    So `[]` is the public internet, `["off"]` nothing, `["*.example.com"]` one domain, and `["public", "10.0.0.0/8"]`
    the public internet plus a private network.
    """

    def __init__(self, allow: Sequence[str] = ()) -> None:
        """Raises `ValueError`, naming the entry, for one that is none of the above."""
        entries = [entry.strip().lower() for entry in allow]
        if "off" in entries and len(entries) > 1:
            raise ValueError("the entry off must stand alone")
        self._rules = [_parse(entry) for entry in entries or ["public"] if entry != "off"]

    def check_host(self, host: str, port: int) -> Address | None:
        """Refuse a host before its name is resolved, where that is possible.

        `host` is in ASCII, without brackets. Returns its address if it is one, None for a name.
        Raises `Forbidden`.
        """
        host = _normal(host)
        try:
            address = parse_address(host)
        except ValueError:
            if looks_numeric(host) or ":" in host or not any(rule.may_match(host, port) for rule in self._rules):
                raise refusal(host) from None
            return None
        self.check_address(host, port, address)
        return address

    def check_address(self, host: str, port: int, address: Address) -> None:
        """Raise `Forbidden` unless an entry allows to reach `host` at `address`."""
        if not any(rule.allows(_normal(host), port, address) for rule in self._rules):
            raise refusal(host)


def refusal(host: str) -> Forbidden:
    """The error for a host that is not allowed. It tells nothing of what the name resolved to."""
    return Forbidden(f"this server's options do not allow media from the host {host!r}")


def _normal(host: str) -> str:
    return host.lower().removesuffix(".")


def _parse(entry: str) -> _Rule:
    if entry == "public":
        return _Rule(public=True)
    target, port = _split_port(entry)
    try:
        return _Rule(network=ipaddress.ip_network(target.removeprefix("[").removesuffix("]")), port=port)
    except ValueError:
        pass
    if not _NAME.fullmatch(target) or looks_numeric(target):
        raise ValueError(f"{entry!r} is no entry of the allow-list: {_EXPECTED}")
    if target.startswith("*."):
        return _Rule(suffix=target[1:], port=port)
    return _Rule(name=target, port=port)


def _split_port(entry: str) -> tuple[str, int | None]:
    target, colon, port = entry.rpartition(":")
    if not colon or (":" in target and not target.endswith("]")) or not port.isdecimal():
        return entry, None
    if not 0 < int(port) < 65536:
        raise ValueError(f"{entry!r}: a port is 1 to 65535")
    return target, int(port)
