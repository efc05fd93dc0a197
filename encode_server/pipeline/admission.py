"""Who may come in: bounds on the requests, bytes and encoder tokens in progress, and on one client's share of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

from encode_server.errors import TooBusy, TooLarge

FIRST_BYTES = 1 << 20  # of a body, held at the door: what a header declares costs its sender nothing
WAITING_S = 5.0  # how long a refused client is taken to be waiting for its next attempt
RATE_WINDOW_S = 5.0  # over which the drain rate forgets


@dataclass(frozen=True)
class AdmissionLimits:
    """`client_share`: the largest part of each of the others that one client may hold while others are active, above 0
    and up to 1."""

    max_requests: int
    max_bytes: int
    max_tokens: int
    client_share: float


@dataclass
class Held:
    """What is in progress, of all or of one client."""

    requests: int = 0
    bytes: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class _Refusal:
    """`bound`: see `telemetry.metrics.REFUSING`."""

    reason: str
    bound: str

    @property
    def full(self) -> bool:
        """For everybody, not for this client's share."""
        return self.bound != "client_share"


@dataclass(eq=False)
class _Waiter:
    client: str
    declared_bytes: int
    ticket: asyncio.Future[Ticket] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(eq=False)
class _Grower:
    """Bytes of a request that was admitted patiently, which wait for room."""

    ticket: Ticket
    nbytes: int
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Ticket:
    """One request's place, and what the request has been found to weigh so far."""

    def __init__(self, admission: Admission, client: str, number: int, *, patient: bool) -> None:
        """`number`: grows from ticket to ticket."""
        self.number = number
        self._admission, self.client, self._patient = admission, client, patient
        self.bytes = self.tokens = 0
        self._ahead = 0  # bytes that are counted and have not arrived yet

    async def grow(self, nbytes: int) -> None:
        """Count bytes that arrive, before they are kept. One that was admitted patiently waits until there is room.
        Otherwise raises as `weigh` does."""
        ahead = min(self._ahead, nbytes)
        self._ahead -= ahead
        more = nbytes - ahead
        if more and self._patient:
            await self._admission.until_room(self, more)
        else:
            self.weigh(nbytes=more)

    def reserve(self, nbytes: int) -> None:
        """Count the first bytes of a body before they have arrived."""
        self._ahead = nbytes
        self.count(nbytes=nbytes, tokens=0)

    def settle(self, nbytes: int) -> None:
        """The body has arrived, and so much is kept of it."""
        self._ahead = 0
        self.count(nbytes=nbytes - self.bytes, tokens=0)
        self._admission.made_room()

    def weigh(self, *, nbytes: int = 0, tokens: int = 0) -> None:
        """Count what is now known of the request: bytes received or fetched, encoder tokens to forward.

        Raises TooLarge when its bytes alone are above the bound, TooBusy when they are together with those of others. A
        request that was admitted patiently is counted in the second case: its caller cannot be told to come again.
        """
        if nbytes > 0:
            self._admission.check_room(self, nbytes, refuse=not self._patient)
        self.count(nbytes=nbytes, tokens=tokens)

    def count(self, *, nbytes: int, tokens: int) -> None:
        """Count without asking."""
        self.bytes += nbytes
        self.tokens += tokens
        self._admission.count(self.client, nbytes=nbytes, tokens=tokens)


class Admission:
    """Counts what is in progress and refuses more than the limits, before a request's body is read."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self.limits = limits
        self.held = Held()
        self._clients: dict[str, Held] = {}
        self._refused: dict[str, float] = {}  # clients that were, and when: for a while they count as waiting
        self._numbers = itertools.count()
        self._growing: list[_Grower] = []
        self._door: deque[_Waiter] = deque()  # who waits to be admitted, in the order of arrival
        self._rate = 0.0  # requests ended per second, decaying
        self._rated_at = time.monotonic()

    @property
    def waiting(self) -> int:
        """Requests that wait at the door, their bodies unread."""
        return len(self._door)

    @property
    def clients(self) -> int:
        """How many clients have requests in progress."""
        return len(self._clients)

    @property
    def most_of_one_client(self) -> int:
        """The most requests in progress that one client has."""
        return max((held.requests for held in self._clients.values()), default=0)

    @contextlib.contextmanager
    def admit(self, client: str, declared_bytes: int) -> Iterator[Ticket]:
        """Hold one place. Raises TooBusy, with `Retry-After` from the rate at which requests have been ending."""
        if (refusal := self._refusal(client, declared_bytes)) is not None:
            if refusal.full:
                self._forget_refused()
                self._refused[client] = time.monotonic()
            raise self._too_busy(refusal)
        with self._held(self._enter(client, declared_bytes, patient=False)) as ticket:
            yield ticket

    @contextlib.asynccontextmanager
    async def admit_patiently(self, client: str, declared_bytes: int, wait_s: float) -> AsyncIterator[Ticket]:
        """Hold one place, and wait for it, first come, first served, where there is none. Raises TooBusy after
        `wait_s` seconds."""
        waiter = _Waiter(client, declared_bytes)
        self._door.append(waiter)
        self._open_door()
        try:
            async with asyncio.timeout(wait_s):
                await asyncio.wait((waiter.ticket,))
        except TimeoutError:
            if not waiter.ticket.done():
                refusal = self._refusal(client, declared_bytes)
                raise self._too_busy(refusal or _Refusal("the request's time was up at the door", "requests")) from None
        except asyncio.CancelledError:
            if waiter.ticket.done():  # admitted in the same moment
                self._leave(waiter.ticket.result())
            raise
        finally:
            if waiter in self._door:
                self._door.remove(waiter)
                self._open_door()  # who waits behind may have waited for this one only
        with self._held(waiter.ticket.result()) as ticket:
            yield ticket

    def count(self, client: str, *, requests: int = 0, nbytes: int = 0, tokens: int = 0) -> None:
        """Add to what is held by all and by this client, which is forgotten when it holds no request."""
        mine = self._clients.setdefault(client, Held())
        for held in (self.held, mine):
            held.requests += requests
            held.bytes += nbytes
            held.tokens += tokens
        if not mine.requests:
            del self._clients[client]

    def check_room(self, ticket: Ticket, nbytes: int, *, refuse: bool) -> None:
        """Raise TooLarge when so many bytes more are too much for one request, TooBusy, if it is to be refused, when
        they are too much beside others."""
        most = self.limits.max_bytes
        if ticket.bytes + nbytes > most:
            raise TooLarge(f"the request holds more than {most >> 20} MiB of media")
        if not refuse:
            return
        if self.held.bytes + nbytes > most:
            self._forget_refused()
            self._refused[ticket.client] = time.monotonic()
            raise self._too_busy(_full_of_media(self.held.bytes, most))
        mine = self._clients[ticket.client]
        over = mine.bytes + nbytes > most * self.limits.client_share
        if over and mine.requests > 1 and self.others(ticket.client):
            raise self._too_busy(_full_share(f"{mine.bytes >> 20} MiB of media"))

    async def until_room(self, ticket: Ticket, nbytes: int) -> None:
        """Count so many bytes more once there is room for them. Where every request in progress waits for room, none
        will ever make any: the oldest goes on. Raises TooLarge as `check_room` does."""
        self.check_room(ticket, nbytes, refuse=False)
        if not self._growing and self._fits(nbytes):
            ticket.count(nbytes=nbytes, tokens=0)
            return
        grower = _Grower(ticket, nbytes)
        self._growing.append(grower)
        self._let_grow()
        try:
            await grower.granted
        finally:
            if grower in self._growing:
                self._growing.remove(grower)

    def _fits(self, nbytes: int) -> bool:
        return self.held.bytes + nbytes <= self.limits.max_bytes

    def _let_grow(self) -> None:
        """Grant room to bodies that wait for it, the oldest first: one that was let through stays the oldest, and
        comes to its end."""
        stuck = len({grower.ticket for grower in self._growing}) >= self.held.requests
        for grower in sorted(self._growing, key=lambda grower: grower.ticket.number):
            if not stuck and not self._fits(grower.nbytes):
                return
            stuck = False
            self._growing.remove(grower)
            if not grower.granted.done():
                grower.ticket.count(nbytes=grower.nbytes, tokens=0)
                grower.granted.set_result(None)

    def made_room(self) -> None:
        """Give room that has become free to the bodies that wait for it, then to the requests at the door."""
        self._let_grow()
        self._open_door()

    def _open_door(self) -> None:
        """Admit who waits, as far as there is room."""
        for waiter in list(self._door):
            refusal = self._refusal(waiter.client, waiter.declared_bytes)
            if refusal is None:
                self._door.remove(waiter)
                waiter.ticket.set_result(self._enter(waiter.client, waiter.declared_bytes, patient=True))
            elif refusal.full:
                return

    @contextlib.contextmanager
    def _held(self, ticket: Ticket) -> Iterator[Ticket]:
        try:
            yield ticket
        finally:
            self._leave(ticket)

    def _enter(self, client: str, declared_bytes: int, *, patient: bool) -> Ticket:
        ticket = Ticket(self, client, next(self._numbers), patient=patient)
        self.count(client, requests=1)
        # Held from now on: many that begin concurrently must not all find room.
        ticket.reserve(min(declared_bytes, FIRST_BYTES))
        return ticket

    def _leave(self, ticket: Ticket) -> None:
        ticket.count(nbytes=-ticket.bytes, tokens=-ticket.tokens)
        self.count(ticket.client, requests=-1)
        self._rate = self._decayed() + 1 / RATE_WINDOW_S
        self.made_room()

    def _refusal(self, client: str, declared_bytes: int) -> _Refusal | None:
        """Why this client cannot come in now."""
        declared_bytes = min(declared_bytes, FIRST_BYTES)
        limits, all_held, mine = self.limits, self.held, self._clients.get(client, Held())
        if all_held.requests >= limits.max_requests:
            reason = f"{all_held.requests} requests are in progress, the limit is {limits.max_requests}"
            return _Refusal(reason, "requests")
        if all_held.bytes and all_held.bytes + declared_bytes > limits.max_bytes:
            return _full_of_media(all_held.bytes, limits.max_bytes)
        if all_held.tokens > limits.max_tokens:
            reason = f"{all_held.tokens} encoder tokens are in progress, the limit is {limits.max_tokens}"
            return _Refusal(reason, "tokens")
        if mine.requests and self.others(client):
            share = limits.client_share
            for over, what in (
                (mine.requests >= max(1, int(limits.max_requests * share)), f"{mine.requests} requests"),
                (mine.bytes + declared_bytes > limits.max_bytes * share, f"{mine.bytes >> 20} MiB of media"),
                (mine.tokens > limits.max_tokens * share, f"{mine.tokens} encoder tokens"),
            ):
                if over:
                    return _full_share(what)
        return None

    def others(self, client: str) -> bool:
        """Whether anybody else has a request in progress, waits at the door, or has been refused lately."""
        self._forget_refused()
        waiting = (waiter.client for waiter in self._door)
        return any(name != client for name in (*self._clients, *self._refused, *waiting))

    def _forget_refused(self) -> None:
        since = time.monotonic() - WAITING_S
        self._refused = {name: at for name, at in self._refused.items() if at > since}

    def _too_busy(self, refusal: _Refusal) -> TooBusy:
        # Half of what is in progress should be gone by then; nothing measured yet means a cold start.
        rate = self._decayed()
        wait = math.ceil(self.held.requests / 2 / rate) if rate > 0.01 else 1
        headers = {"Retry-After": str(min(max(wait, 1), 60))}
        return TooBusy(refusal.reason, headers=headers, bound=refusal.bound)

    def _decayed(self) -> float:
        now = time.monotonic()
        self._rate *= math.exp((self._rated_at - now) / RATE_WINDOW_S)
        self._rated_at = now
        return self._rate


def _full_share(what: str) -> _Refusal:
    return _Refusal(f"this client has {what} in progress, its full share while others are active", "client_share")


def _full_of_media(held: int, most: int) -> _Refusal:
    return _Refusal(f"{held >> 20} MiB of media are in progress, the limit is {most >> 20} MiB", "bytes")
