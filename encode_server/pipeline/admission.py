"""Who may come in: bounds on the requests, bytes and encoder tokens in work, and on one client's share of them."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from encode_server.errors import TooBusy, TooLarge
from encode_server.telemetry.metrics import Metrics

WAITING_S = 5.0  # how long a refused client is taken to be waiting for its next attempt
RATE_WINDOW_S = 5.0  # over which the drain rate forgets


@dataclass(frozen=True)
class AdmissionLimits:
    """`client_share`: the part of each of the others that one client may hold beside others, above 0 and up to 1."""

    max_requests: int
    max_bytes: int
    max_tokens: int
    client_share: float


@dataclass
class Held:
    """What is in work, of all or of one client."""

    requests: int = 0
    bytes: int = 0
    tokens: int = 0


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
        self._admission.count(self.client, nbytes=nbytes, tokens=tokens)


class Admission:
    """Counts what is in work and refuses more than the limits, before a request's body is read."""

    def __init__(self, limits: AdmissionLimits, metrics: Metrics) -> None:
        self._limits, self._metrics = limits, metrics
        self.held = Held()
        self._clients: dict[str, Held] = {}
        self._refused: dict[str, float] = {}  # clients that were, and when: for a while they count as waiting
        self._rate = 0.0  # requests ended per second, decaying
        self._rated_at = time.monotonic()

    @contextlib.contextmanager
    def admit(self, client: str, declared_bytes: int) -> Iterator[Ticket]:
        """Hold one place. Raises TooBusy, with `Retry-After` from the rate at which requests have been ending."""
        self._check(client, declared_bytes)
        ticket = Ticket(self, client)
        self.count(client, requests=1)
        # Held from now on: many that begin at once must not all find room.
        ticket.count(nbytes=declared_bytes, tokens=0)
        try:
            yield ticket
        finally:
            ticket.count(nbytes=-ticket.bytes, tokens=-ticket.tokens)
            self.count(client, requests=-1)
            self._rate = self._decayed() + 1 / RATE_WINDOW_S

    def count(self, client: str, *, requests: int = 0, nbytes: int = 0, tokens: int = 0) -> None:
        """Add to what is held by all and by this client, which is forgotten when it holds no request."""
        mine = self._clients.setdefault(client, Held())
        for held in (self.held, mine):
            held.requests += requests
            held.bytes += nbytes
            held.tokens += tokens
        if not mine.requests:
            del self._clients[client]
        self._metrics.in_work.set(self.held.requests)

    def check_room(self, ticket: Ticket, nbytes: int) -> None:
        """Raise when there is no room for so many bytes more of this request."""
        most = self._limits.max_bytes
        if ticket.bytes + nbytes > most:
            raise TooLarge(f"the request holds more than {most >> 20} MiB of media")
        if self.held.bytes + nbytes > most:
            self._refuse_full(ticket.client, f"{self.held.bytes >> 20} MiB of media are in work", f"{most >> 20} MiB")

    def _check(self, client: str, declared_bytes: int) -> None:
        limits, all_held, mine = self._limits, self.held, self._clients.get(client, Held())
        if all_held.requests >= limits.max_requests:
            self._refuse_full(client, f"{all_held.requests} requests are in work", str(limits.max_requests))
        if all_held.bytes and all_held.bytes + declared_bytes > limits.max_bytes:
            most = f"{limits.max_bytes >> 20} MiB"
            self._refuse_full(client, f"{all_held.bytes >> 20} MiB of media are in work", most)
        if all_held.tokens > limits.max_tokens:
            self._refuse_full(client, f"{all_held.tokens} encoder tokens are in work", str(limits.max_tokens))
        if mine.requests and self._others(client):
            share = limits.client_share
            if mine.requests >= max(1, int(limits.max_requests * share)):
                self._refuse_share(f"{mine.requests} requests")
            if mine.bytes + declared_bytes > limits.max_bytes * share:
                self._refuse_share(f"{mine.bytes >> 20} MiB of media")
            if mine.tokens > limits.max_tokens * share:
                self._refuse_share(f"{mine.tokens} encoder tokens")

    def _others(self, client: str) -> bool:
        """Whether anybody else is in work or has been refused lately."""
        self._forget_refused()
        return any(name != client for name in (*self._clients, *self._refused))

    def _forget_refused(self) -> None:
        since = time.monotonic() - WAITING_S
        self._refused = {name: at for name, at in self._refused.items() if at > since}

    def _refuse_full(self, client: str, what: str, limit: str) -> NoReturn:
        self._forget_refused()
        self._refused[client] = time.monotonic()
        self._refuse(f"{what}, the limit is {limit}")

    def _refuse_share(self, what: str) -> NoReturn:
        self._refuse(f"{what} of this client are in work, its share while others wait too")

    def _refuse(self, reason: str) -> NoReturn:
        # Half of what is in work should be gone by then; nothing measured yet means a cold start.
        rate = self._decayed()
        wait = math.ceil(self.held.requests / 2 / rate) if rate > 0.01 else 1
        raise TooBusy(reason, headers={"Retry-After": str(min(max(wait, 1), 60))})

    def _decayed(self) -> float:
        now = time.monotonic()
        self._rate *= math.exp((self._rated_at - now) / RATE_WINDOW_S)
        self._rated_at = now
        return self._rate
