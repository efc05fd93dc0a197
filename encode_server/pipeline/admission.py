"""Who may come in: bounds on the requests, bytes and encoder tokens in work, and on one client's share of them."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from encode_server.errors import TooBusy, TooLarge
from encode_server.telemetry.metrics import Metrics

WAITING_S = 5.0  # how long a refused client is taken to be waiting for its next attempt
RATE_WINDOW_S = 5.0  # over which the drain rate forgets


@dataclass(frozen=True)
class AdmissionLimits:
    """`client_share`: the part of `max_requests` that one client may hold, above 0 and up to 1."""

    max_requests: int
    max_bytes: int
    max_tokens: int
    client_share: float


class Ticket:
    """One request's place, and what it has been found to weigh so far."""

    def __init__(self, admission: Admission, client: str) -> None:
        self._admission, self.client = admission, client
        self.bytes = self.tokens = 0

    def weigh(self, *, nbytes: int = 0, tokens: int = 0) -> None:
        """Count what is now known of the request: bytes received or fetched, encoder tokens to forward.

        Raises TooLarge when its bytes alone are above the bound, TooBusy when they are with those of others.
        """
        if nbytes > 0:
            self._admission.check_room(self, nbytes)
        self.count(nbytes=nbytes, tokens=tokens)

    def count(self, *, nbytes: int, tokens: int) -> None:
        """Count without asking."""
        self.bytes += nbytes
        self.tokens += tokens
        self._admission.bytes += nbytes
        self._admission.tokens += tokens


class Admission:
    """Counts what is in work and refuses more than the limits, before a request's body is read."""

    def __init__(self, limits: AdmissionLimits, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        self._clients: Counter[str] = Counter()
        self._refused: dict[str, float] = {}  # clients that were, and when: for a while they count as waiting
        self._rate = 0.0  # requests ended per second, decaying
        self._rated_at = time.monotonic()
        self.in_work = self.bytes = self.tokens = 0

    @contextlib.contextmanager
    def admit(self, client: str, declared_bytes: int) -> Iterator[Ticket]:
        """Hold one place. Raises TooBusy, with `Retry-After` from the rate at which requests have been ending."""
        self._check(client, declared_bytes)
        ticket = Ticket(self, client)
        # Held from now on: many that begin at once must not all find room.
        ticket.count(nbytes=declared_bytes, tokens=0)
        self._clients[client] += 1
        self._enter(1)
        try:
            yield ticket
        finally:
            ticket.count(nbytes=-ticket.bytes, tokens=-ticket.tokens)
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]
            self._enter(-1)
            self._rate = self._decayed() + 1 / RATE_WINDOW_S

    def check_room(self, ticket: Ticket, nbytes: int) -> None:
        """Raise when there is no room for so many bytes more of this request."""
        most = self._limits.max_bytes
        if ticket.bytes + nbytes > most:
            raise TooLarge(f"the request holds more than {most >> 20} MiB of media")
        if self.bytes + nbytes > most:
            self._refuse(f"{self.bytes >> 20} MiB of media are in work, the limit is {most >> 20} MiB")

    def _check(self, client: str, declared_bytes: int) -> None:
        limits = self._limits
        share = max(1, int(limits.max_requests * limits.client_share))
        if self.in_work >= limits.max_requests:
            self._forget_refused()
            self._refused[client] = time.monotonic()
            self._refuse(f"{self.in_work} requests are in work, the limit")
        if self._clients[client] >= share and self._others(client):
            self._refuse(f"{share} requests of this client are in work, its share while others wait too")
        if self.bytes and self.bytes + declared_bytes > limits.max_bytes:
            self._refuse(f"{self.bytes >> 20} MiB of media are in work, the limit is {limits.max_bytes >> 20} MiB")
        if self.tokens > limits.max_tokens:
            self._refuse(f"{self.tokens} encoder tokens are in work, the limit is {limits.max_tokens}")

    def _others(self, client: str) -> bool:
        """Whether anybody else is in work or has been refused lately."""
        self._forget_refused()
        return any(name != client for name in (*self._clients, *self._refused))

    def _forget_refused(self) -> None:
        since = time.monotonic() - WAITING_S
        self._refused = {name: at for name, at in self._refused.items() if at > since}

    def _refuse(self, reason: str) -> None:
        # Half of what is in work should be gone by then; nothing measured yet means a cold start.
        rate = self._decayed()
        wait = math.ceil(self.in_work / 2 / rate) if rate > 0.01 else 1
        raise TooBusy(reason, headers={"Retry-After": str(min(max(wait, 1), 60))})

    def _enter(self, change: int) -> None:
        self.in_work += change
        self._metrics.in_work.set(self.in_work)

    def _decayed(self) -> float:
        now = time.monotonic()
        self._rate *= math.exp((self._rated_at - now) / RATE_WINDOW_S)
        self._rated_at = now
        return self._rate
