"""URLs of servers."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit


def split_server_url(url: str) -> SplitResult:
    """The parts of an http(s) URL with a host and, perhaps, a port. Raises ValueError for anything else."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:  # `port` raises, too
        raise ValueError("no URL of a server")
    return parts


def port_of(parts: SplitResult) -> int:
    """The port, by default that of the scheme."""
    return parts.port or (443 if parts.scheme == "https" else 80)
