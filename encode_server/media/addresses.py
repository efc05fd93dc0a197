"""Which IP addresses belong to the public internet, in any notation and behind any tunnel."""

from __future__ import annotations

import ipaddress
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# IANA's special-purpose registries, written out because `is_global` differs between Python releases. The last
# entries of each are metadata services of clouds at addresses that look ordinary.
_V4_SPECIAL = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
    *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
    *("224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
)
_V6_GLOBAL = IPv6Network("2000::/3")
# 2001::/23 holds Teredo, 2002::/16 is 6to4: tunnels to an IPv4 address of the writer's choice.
_V6_SPECIAL = ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
_NAT64 = IPv6Network("64:ff9b::/96")
_ISATAP = (0x00005EFE, 0x02005EFE)

_PRIVATE = (*("10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "::1/128", "fc00::/7"),)
_METADATA = ("100.100.100.200/32", "fd00:ec2::254/128", "fd20:ce::254/128")

_SPECIAL = tuple(ipaddress.ip_network(text) for text in (*_V4_SPECIAL, *_V6_SPECIAL))
_PRIVATE_NETWORKS = tuple(ipaddress.ip_network(text) for text in _PRIVATE)
_METADATA_NETWORKS = tuple(ipaddress.ip_network(text) for text in _METADATA)


def parse_address(text: str) -> Address:
    """The address `text` spells; an IPv4-mapped IPv6 address becomes the IPv4 address that it reaches.

    Raises `ValueError` for anything but plain dotted decimal and IPv6 notation, scope ids included.
    """
    if "%" in text:
        raise ValueError("a scope id is not supported")
    address = ipaddress.ip_address(text)
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def is_public(address: Address) -> bool:
    """True if `address` is a unicast address of the public internet and hides no other address."""
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _V6_GLOBAL or (int(address) >> 32) & 0xFFFFFFFF in _ISATAP:
            return False
    return not any(address in network for network in _SPECIAL)


def is_private(address: Address) -> bool:
    """True for loopback, private and carrier-grade NAT addresses; False for link-local and metadata addresses."""
    return not is_metadata(address) and any(address in network for network in _PRIVATE_NETWORKS)


def is_metadata(address: Address) -> bool:
    """True for a cloud's metadata service at an address that looks private."""
    return any(address in network for network in _METADATA_NETWORKS)


def looks_numeric(host: str) -> bool:
    """True if some resolvers read `host` as a number: its last label is decimal or hexadecimal, as in `0x7f.1`."""
    return re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]*", host.rsplit(".", 1)[-1]) is not None
