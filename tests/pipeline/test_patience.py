"""Waiting at the door: first come, first served, and whoever leaves leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from encode_server.errors import TooBusy
from encode_server.pipeline.admission import Admission, AdmissionLimits, Ticket


class Visitor:
    """A request that waits at the door, then holds its place until told to leave."""

    def __init__(self, gate: Admission, client: str, nbytes: int, wait_s: float) -> None:
        self._leave = asyncio.Event()
        self.ticket: Ticket | None = None
        self.task = asyncio.create_task(self._visit(gate, client, nbytes, wait_s))

    async def _visit(self, gate: Admission, client: str, nbytes: int, wait_s: float) -> None:
        async with gate.admit_patiently(client, nbytes, wait_s) as ticket:
            self.ticket = ticket
            await self._leave.wait()

    @property
    def inside(self) -> bool:
        return self.ticket is not None and not self.task.done()

    async def leave(self) -> None:
        self._leave.set()
        await self.task


class Door:
    """An admission, and its visitors."""

    def __init__(self, requests: int, nbytes: int, share: float) -> None:
        self.gate = Admission(AdmissionLimits(requests, nbytes, 1000, share))
        self.visitors: list[Visitor] = []

    async def visit(self, client: str = "a", nbytes: int = 0, wait_s: float = 60.0) -> Visitor:
        visitor = Visitor(self.gate, client, nbytes, wait_s)
        self.visitors.append(visitor)
        await turn()
        return visitor


async def turn() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def door(requests: int = 2, nbytes: int = 1000, share: float = 1.0) -> AsyncIterator[Door]:
    d = Door(requests, nbytes, share)
    yield d
    for visitor in d.visitors:
        visitor.task.cancel()
    await asyncio.gather(*(visitor.task for visitor in d.visitors), return_exceptions=True)
    held = d.gate.held
    assert (held.requests, held.bytes, held.tokens, d.gate.waiting) == (0, 0, 0, 0)


def run(scenario: Callable[[Door], Awaitable[None]], requests: int = 2, nbytes: int = 1000, share: float = 1.0) -> None:
    async def at_door() -> None:
        async with door(requests, nbytes, share) as d:
            await scenario(d)

    asyncio.run(at_door())


def test_first_come_first_served() -> None:
    async def scenario(d: Door) -> None:
        visitors = [await d.visit() for _ in range(5)]
        assert [v.inside for v in visitors] == [True, True, False, False, False]
        await visitors[1].leave()
        await turn()
        assert [v.inside for v in visitors] == [True, False, True, False, False]
        await visitors[0].leave()
        await turn()
        assert [v.inside for v in visitors] == [False, False, True, True, False]
        assert d.gate.waiting == 1

    run(scenario)


def test_small_ones_do_not_overtake_a_large_one() -> None:
    async def scenario(d: Door) -> None:
        first = await d.visit(nbytes=600)
        large = await d.visit(nbytes=900)
        small = await d.visit(nbytes=10)
        assert [first.inside, large.inside, small.inside] == [True, False, False]
        await first.leave()
        await turn()
        assert [large.inside, small.inside] == [True, True]

    run(scenario, requests=10)


def test_whoever_gives_up_lets_those_behind_in() -> None:
    """Without waiting for somebody inside to leave."""

    async def scenario(d: Door) -> None:
        await d.visit(nbytes=600)
        large = await d.visit(nbytes=900)
        small = await d.visit(nbytes=10)
        large.task.cancel()
        await turn()
        assert small.inside

    run(scenario, requests=10)


def test_bytes_that_were_declared_and_did_not_come_let_the_next_one_in() -> None:
    """A body of unknown length counts as the largest until it has arrived."""

    async def scenario(d: Door) -> None:
        first = await d.visit(nbytes=900)
        second = await d.visit(nbytes=900)
        assert first.ticket and not second.inside
        first.ticket.settle(10)
        await turn()
        assert second.inside

    run(scenario, requests=10)


def test_bytes_that_did_not_come_let_a_body_grow_that_waits() -> None:
    async def scenario(d: Door) -> None:
        first = await d.visit(nbytes=600)
        second = await d.visit(nbytes=10)
        growing = asyncio.create_task(second.ticket.grow(800))
        await turn()
        assert not growing.done()
        first.ticket.settle(100)
        async with asyncio.timeout(10):
            await growing

    run(scenario, requests=10)


def test_too_long_a_wait_ends_as_too_busy() -> None:
    async def scenario(d: Door) -> None:
        await d.visit()
        late = await d.visit(wait_s=0.01)
        with pytest.raises(TooBusy, match="1 requests are in progress"):
            await late.task
        assert d.gate.waiting == 0

    run(scenario, requests=1)


def test_cancelled_while_waiting_leaves_nothing() -> None:
    async def scenario(d: Door) -> None:
        inside = await d.visit()
        waiting, behind = await d.visit(nbytes=10), await d.visit()
        waiting.task.cancel()
        await inside.leave()
        await turn()
        assert behind.inside and d.gate.held.bytes == 0

    run(scenario, requests=1)


def test_cancelled_in_the_moment_of_admission_gives_the_place_to_the_next() -> None:
    async def scenario(d: Door) -> None:
        inside = await d.visit()
        waiting, behind = await d.visit(nbytes=10), await d.visit()
        inside._leave.set()
        while d.gate.held.bytes == 0:  # noqa: ASYNC110 - the moment in which it is admitted and has not run
            await asyncio.sleep(0)
        assert not waiting.inside
        waiting.task.cancel()
        await turn()
        assert not waiting.inside and behind.inside

    run(scenario, requests=1)


def test_a_client_waits_for_its_share_while_others_pass() -> None:
    async def scenario(d: Door) -> None:
        greedy = [await d.visit("greedy") for _ in range(2)]
        modest = await d.visit("modest")
        more = await d.visit("greedy")
        assert modest.inside and not more.inside
        await greedy[0].leave()
        await turn()
        assert more.inside  # its share is free again

    run(scenario, requests=4, share=0.5)


def test_what_is_fetched_beyond_the_limit_is_counted_and_not_refused() -> None:
    """Its caller cannot be told to come again."""

    async def scenario(d: Door) -> None:
        first, second = await d.visit(nbytes=10), await d.visit(nbytes=10)
        assert first.ticket and second.ticket
        first.ticket.weigh(nbytes=700)
        second.ticket.weigh(nbytes=700)
        third = await d.visit(nbytes=10)
        assert not third.inside
        await first.leave()
        await turn()
        assert third.inside

    run(scenario, requests=10)
