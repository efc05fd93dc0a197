"""Who asked for which part: destinations that register before, while or after the part is encoded."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from encode_server.errors import BadRequest, DeliveryFailed, Duplicate, EncodeError, TooBusy

EARLY_S = 180.0  # how long a destination may be there before its /encode is
MAX_EARLY = 16384
MAX_OFFERS = 256  # destinations of one req_id, of all who register for it


class Landing:
    """Memory of a destination that the embedding is to be written to (Mooncake): `nbytes` at `address` of the engine
    `session` (`host:port`). `landed` ends when that has happened, or will not.

    The destination may use the memory for something else as soon as it has been told an end. So nothing is written
    after that, and no end is told while the embedding is being written.
    """

    def __init__(self, session: str, address: int, nbytes: int) -> None:
        self.session, self.address, self.nbytes = session, address, nbytes
        self.landed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writing = False

    def begin(self) -> bool:
        """Whether the embedding may be written now. If so, the writer calls `written` afterwards."""
        self._writing = not self.landed.done()
        return self._writing

    def written(self, error: EncodeError | None = None) -> None:
        """The writer is done."""
        self._writing = False
        self.end(error)

    def end(self, error: EncodeError | None = None) -> None:
        """Tell whoever waits, unless the embedding is being written. Only the first word counts."""
        if self._writing or self.landed.done():
            return
        if error is None:
            self.landed.set_result(None)
        else:
            self.landed.set_exception(error)
            self.landed.exception()  # the caller may be gone

    async def until_landed(self, limit_s: float) -> None:
        """Return once the embedding has been written. Raises what prevented it, DeliveryFailed when it is not begun
        within `limit_s` seconds."""
        try:
            await asyncio.wait((self.landed,), timeout=limit_s)
            self.end(DeliveryFailed(f"the embedding was not there within {limit_s:g} s"))
            await asyncio.wait((self.landed,))
        finally:
            self.end(DeliveryFailed("nobody waits for the embedding any more"))
        self.landed.result()


@dataclass(frozen=True)
class Offer:
    """A destination, `tcp://address:port`, and the client that registered it. `landing`: None where the embedding goes
    over the same connection as its header."""

    endpoint: str
    client: str
    landing: Landing | None = field(default=None, compare=False)

    @property
    def address(self) -> str:
        """The endpoint's IP address."""
        return self.endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")


Accepts = Callable[[Offer], bool]


class Registration:
    """The destinations offered for one req_id."""

    def __init__(self) -> None:
        self.users = 0  # parts in progress that go to them
        self.offers: dict[Offer, int] = {}  # and how many destinations each says there are
        self.changed = asyncio.Event()  # set, and replaced by a new one, when an offer is added

    def add(self, offer: Offer, wanted: int) -> bool:
        """Add a destination; False when it was there already.

        Raises BadRequest when the destinations of one address contradict each other or are more than they say, TooBusy
        when there are too many altogether.
        """
        if offer in self.offers:
            return False
        beside = {other: count for other, count in self.offers.items() if other.address == offer.address}
        for count in beside.values():
            if count != wanted:
                raise BadRequest(f"receive_count is {wanted}, an earlier registration of this req_id said {count}")
        if len(beside) >= wanted:
            raise BadRequest(f"receive_count is {wanted}, and as many other destinations are registered already")
        if len(self.offers) >= MAX_OFFERS:
            raise TooBusy(f"{MAX_OFFERS} destinations are registered for this req_id already")
        self.offers[offer] = wanted
        self.changed.set()
        self.changed = asyncio.Event()
        return True


class Destinations:
    """Where one part goes. A stranger who knows the req_id may offer destinations, too: `accepts` says which of them
    count for this part. Other parts of the req_id have a rule of their own."""

    def __init__(self, registration: Registration, accepts: Accepts = lambda offer: True) -> None:
        self._registration, self._accepts = registration, accepts

    @property
    def wanted(self) -> int | None:
        """How many destinations there will be, None until the first that counts has said so."""
        return next((wanted for offer, wanted in self._registration.offers.items() if self._accepts(offer)), None)

    @property
    def endpoints(self) -> list[str]:
        """The destinations that count, in the order in which they came, no more than are wanted."""
        accepted = (offer.endpoint for offer in self._registration.offers if self._accepts(offer))
        return list(dict.fromkeys(accepted))[: self.wanted]

    def landing(self, endpoint: str) -> Landing | None:
        """Where the embedding for this destination is written to, None where it is pushed."""
        offers = (offer for offer in self._registration.offers if offer.endpoint == endpoint and self._accepts(offer))
        return next(offers).landing

    async def arrivals(self) -> AsyncIterator[str]:
        """Each destination once, as they come, until all that are wanted came."""
        given: set[str] = set()
        while self.wanted is None or len(given) < self.wanted:
            new = [endpoint for endpoint in self.endpoints if endpoint not in given]
            if not new:
                await self._registration.changed.wait()
                continue
            for endpoint in new:
                given.add(endpoint)
                yield endpoint


class Registrations:
    """All registrations. A destination for which no part in progress asks is forgotten after `early_s` seconds, or when
    there are more than `max_early`: then the oldest of the client that has most of them."""

    def __init__(self, early_s: float = EARLY_S, max_early: int = MAX_EARLY) -> None:
        self._early_s, self._max_early = early_s, max_early
        self._known: dict[str, Registration] = {}
        self._early: dict[str, dict[tuple[str, Offer], asyncio.TimerHandle]] = {}  # by client, the oldest first
        self._count = 0

    def __len__(self) -> int:
        return len(self._known)

    def register(self, req_id: str, offer: Offer, wanted: int) -> None:
        """Note that `offer` wants this part, `wanted` destinations in all. Raises as `Registration.add` does, and
        Duplicate for memory of a destination that has offered memory before."""
        registration = self._known.get(req_id) or Registration()
        if not registration.add(offer, wanted):
            if offer.landing is not None:
                raise Duplicate("this destination is registered for this req_id already")
            return
        self._known[req_id] = registration
        timer = asyncio.get_running_loop().call_later(self._early_s, self._expire, req_id, offer)
        self._early.setdefault(offer.client, {})[req_id, offer] = timer
        self._count += 1
        if self._count > self._max_early:
            most = max(self._early.values(), key=len)
            self._expire(*next(iter(most)))

    @contextlib.contextmanager
    def use(self, req_id: str, accepts: Accepts = lambda offer: True) -> Iterator[Destinations]:
        """The destinations of a part in progress; forgotten with what came for them when the last part of the req_id
        has ended."""
        registration = self._known.setdefault(req_id, Registration())
        registration.users += 1
        try:
            yield Destinations(registration, accepts)
        finally:
            registration.users -= 1
            if not registration.users:
                for offer in registration.offers:
                    self._forget(req_id, offer)
                del self._known[req_id]

    def close(self) -> None:
        """Forget everything."""
        for early in list(self._early.values()):
            for req_id, offer in list(early):
                self._expire(req_id, offer)

    def _expire(self, req_id: str, offer: Offer) -> None:
        """The destination has waited too long, or others need its place. One that is in use stays until its part has
        ended."""
        self._forget(req_id, offer)
        registration = self._known.get(req_id)
        if registration is None or registration.users:
            return
        registration.offers.pop(offer, None)
        if not registration.offers:
            del self._known[req_id]

    def _in_use(self, req_id: str) -> bool:
        return (known := self._known.get(req_id)) is not None and known.users > 0

    def _forget(self, req_id: str, offer: Offer) -> None:
        """Count the destination no longer."""
        if offer.landing is not None and not self._in_use(req_id):
            offer.landing.end(DeliveryFailed("there is no such embedding any more"))
        early = self._early.get(offer.client, {})
        timer = early.pop((req_id, offer), None)
        if timer is not None:
            timer.cancel()
            self._count -= 1
        if not early:
            self._early.pop(offer.client, None)
