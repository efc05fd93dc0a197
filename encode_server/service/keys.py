"""API keys: who may ask for an encode."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request

from encode_server.errors import Unauthorized


class ApiKeys:
    """Checks `Authorization: Bearer KEY` against the keys given, in constant time; with none given, all may ask."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def client(self, request: Request) -> str:
        """Who asks, for fairness: the key's digest, else the peer's address. Raises Unauthorized."""
        if not self._digests:
            return request.client.host if request.client else ""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode()).digest()
        # Every key is compared, and digests of one length: the time tells nothing.
        known = [hmac.compare_digest(digest, other) for other in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            raise Unauthorized(
                "an API key is needed, as `Authorization: Bearer KEY`", headers={"WWW-Authenticate": "Bearer"}
            )
        return digest.hex()[:16]
