"""The encoders of a pool: which of them are well, how much work each has, and which one is next."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal

import msgspec

from encode_server.client.affinity import by_affinity
from encode_server.client.errors import ClientError
from encode_server.client.http import EncodeClient, Health
from encode_server.client.workload import ItemCost, Workload
from encode_server.wire.load import Load

logger = logging.getLogger(__name__)

Choice = Literal["content", "least_loaded"]

PROBE_TIMEOUT_S = 3.0
SICK_PROBE_S = 0.5
PATIENT_PROBES = 20  # of a sick encoder, at SICK_PROBE_S; later ones are further and further apart
MISSES = 2  # a machine that is short of CPU misses one now and then
MAX_PLACED = 16384  # items of which is known where they went last
# An item leaves its owner only for an encoder that could begin earlier by both of these: there the item may have to be
# encoded again.
AHEAD_S = 0.1
AHEAD_ITEMS = 2.0  # times an item's device time


class Encoder:
    """One encoder as the pool sees it. `not_before` is of `time.monotonic()`. `lost` is set while the encoder does not
    even answer probes: what it was given is not coming."""

    def __init__(self, client: EncodeClient, item_cost: ItemCost) -> None:
        self.client = client
        self.url = client.base_url
        self.healthy = True  # until proven otherwise: the first request needn't wait for a probe
        self.not_before = 0.0
        self.work = Workload(item_cost)
        self.suspected = asyncio.Event()
        self.lost = asyncio.Event()
        self.failures = 0  # requests that came to nothing there
        client.on_answer = self.work.note

    @property
    def in_flight(self) -> int:
        """Items that the encoder was given and has not answered."""
        return self.work.in_flight

    @contextlib.contextmanager
    def working(self, items: int) -> Iterator[None]:
        """Count `items` as in flight."""
        self.work.sent(items)
        try:
            yield
        finally:
            self.work.ended(items)


class Encoders:
    """Chooses among encoders, and keeps asking each for its health. Used on one loop.

    `make`: a client of the encoder at a URL.
    """

    def __init__(
        self, urls: Sequence[str], make: Callable[[str], EncodeClient], choice: Choice, probe_s: float
    ) -> None:
        self._make, self._choice, self._probe_s = make, choice, probe_s
        self._item_cost = ItemCost()
        self._members: dict[str, Encoder] = {}
        self._watchers: dict[Encoder, asyncio.Task[None]] = {}
        self._watching: asyncio.TaskGroup | None = None
        self._retiring: dict[Encoder, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._placed: OrderedDict[bytes, Encoder] = OrderedDict()  # where each item went last, newest last
        for url in urls:
            self.add(url)

    @property
    def all(self) -> list[Encoder]:
        """The members."""
        return list(self._members.values())

    def add(self, url: str) -> Encoder:
        """Make the encoder at `url` a member. The URL of a member changes nothing."""
        url = url.rstrip("/")
        if (known := self._members.get(url)) is not None:
            return known
        encoder = self._members[url] = Encoder(self._make(url), self._item_cost)
        self._announce()
        if self._watching is not None:
            self._begin_watching(encoder, self._watching)
        return encoder

    def remove(self, url: str) -> None:
        """The encoder is no longer a member and gets nothing new. Items in flight there go on; its connections are
        closed after the last of them."""
        encoder = self._members.pop(url.rstrip("/"), None)
        if encoder is None:
            return
        if (watcher := self._watchers.pop(encoder, None)) is not None:
            watcher.cancel()
        retiring = self._retiring[encoder] = asyncio.create_task(_retire(encoder))
        retiring.add_done_callback(lambda _: self._retiring.pop(encoder, None))

    async def aclose(self) -> None:
        """Close the connections of all members, and of former ones."""
        former = dict(self._retiring)
        for task in former.values():
            task.cancel()
        await asyncio.gather(*former.values(), return_exceptions=True)
        for encoder in (*self.all, *former):
            await encoder.client.aclose()

    async def choose(self, key: bytes, avoid: Collection[Encoder]) -> Encoder:
        """The encoder for an item; waits while none takes requests. One of `avoid` only when no other is left."""
        while True:
            if (found := self.pick(key, avoid)) is not None:
                return found
            waits = [encoder.not_before - time.monotonic() for encoder in self.all if encoder.healthy]
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.001, min(waits)) if waits else None):
                    await self._changed.wait()

    def pick(self, key: bytes, avoid: Collection[Encoder] = ()) -> Encoder | None:
        """The encoder for an item right now, None when all are sick or busy.

        By content: the encoder that was given the item last, else the item's owner, unless another encoder could begin
        so much earlier that encoding the item again would cost less than waiting.
        """
        now = time.monotonic()
        ready = [encoder for encoder in self.all if encoder.healthy and encoder.not_before <= now]
        ready = [encoder for encoder in ready if encoder not in avoid] or ready
        if not ready:
            return None
        ordered = by_affinity(key, [(encoder.url, encoder) for encoder in ready])
        least = min(ordered, key=lambda encoder: encoder.work.seconds)
        if self._choice == "least_loaded":
            return least
        last = self._placed.pop(key, None)
        owner = last if last in ready else ordered[0]
        ahead_s = max(AHEAD_S, AHEAD_ITEMS * least.work.item_s)
        chosen = owner if owner.work.seconds <= least.work.seconds + ahead_s else least
        self._placed[key] = chosen
        if len(self._placed) > MAX_PLACED:
            self._placed.popitem(last=False)
        return chosen

    def plan(self, keys: Sequence[bytes]) -> list[list[int]]:
        """The items, by index, in groups that go to one encoder each."""
        groups: dict[Encoder | None, list[int]] = {}
        for index, key in enumerate(keys):
            encoder = self.pick(key)
            if encoder is not None:
                encoder.work.sent(1)  # so that the next item is placed beside this item
            groups.setdefault(encoder, []).append(index)
        for encoder, indices in groups.items():
            if encoder is not None:
                encoder.work.unsent(len(indices))
        return list(groups.values())

    def busy(self, encoder: Encoder, seconds: float) -> None:
        """It asked not to be sent anything for so long."""
        encoder.not_before = max(encoder.not_before, time.monotonic() + seconds)

    def suspect(self, encoder: Encoder) -> None:
        """It failed: nothing is sent there until it says that it is well."""
        encoder.failures += 1
        self._judge(encoder, False)
        encoder.suspected.set()

    async def watch(self) -> None:
        """Ask each encoder for its health, again and again, until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._watching = group
            for encoder in self.all:
                self._begin_watching(encoder, group)
            await asyncio.Event().wait()  # members may come while there are none

    def _begin_watching(self, encoder: Encoder, group: asyncio.TaskGroup) -> None:
        # In an empty context: probes carry no request's headers, not even of the request that registered the encoder.
        watcher = group.create_task(self._watch(encoder), context=contextvars.Context())
        self._watchers[encoder] = watcher

    async def _watch(self, encoder: Encoder) -> None:
        misses = 0
        while True:
            encoder.suspected.clear()
            health = await _health(encoder)
            well = health is not None and health.ok
            misses = 0 if well else misses + 1
            if health is not None:
                encoder.lost.clear()
                _note_load(encoder, health)
            elif misses >= MISSES:
                encoder.lost.set()
            if not encoder.suspected.is_set() and (well or misses >= MISSES):  # a suspicion is newer than the answer
                self._judge(encoder, well)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pause(encoder, misses)):
                    await encoder.suspected.wait()
            await asyncio.sleep(0.05)  # whatever fails how fast: no busy loop

    def _pause(self, encoder: Encoder, misses: int) -> float:
        """Seconds until the next probe: soon for an encoder that was well a moment ago, seldom for one long gone."""
        if not misses and encoder.healthy:
            return self._probe_s
        return min(self._probe_s, SICK_PROBE_S * max(1.0, misses / PATIENT_PROBES))

    def _judge(self, encoder: Encoder, healthy: bool) -> None:
        if encoder.healthy == healthy:
            return
        encoder.healthy = healthy
        logger.log(logging.INFO if healthy else logging.WARNING, "%s is %s", encoder.url, "well" if healthy else "sick")
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


async def _retire(encoder: Encoder) -> None:
    """Close the connections of a former member, as soon as nothing is in flight there."""
    while encoder.in_flight:  # noqa: ASYNC110 - seconds do not matter here
        await asyncio.sleep(1.0)
    await encoder.client.aclose()


async def _health(encoder: Encoder) -> Health | None:
    """What the encoder says of itself, None when it does not answer."""
    with contextlib.suppress(ClientError, TimeoutError):
        return await encoder.client.health(timeout=PROBE_TIMEOUT_S)
    return None


def _note_load(encoder: Encoder, health: Health) -> None:
    document = {"backlog_s": health.document.get("backlog_seconds"), "capacity": health.document.get("capacity")}
    with contextlib.suppress(msgspec.ValidationError):
        encoder.work.say(msgspec.convert(document, Load))
