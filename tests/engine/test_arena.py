"""The arena grants disjoint slots, in order, and takes every byte back."""

import asyncio
import itertools
import random

import pytest

from encode_server.engine.arena import ALIGNMENT, Arena
from encode_server.errors import TooLarge

MIB = 1 << 20


@pytest.fixture
def arena():
    arena = Arena(MIB, reserve=64 << 10)
    yield arena
    arena.close()


def test_slots_never_overlap_and_all_room_comes_back(arena):
    async def churn():
        rng = random.Random(7)
        held = []
        for _ in range(2000):
            if held and (rng.random() < 0.5 or arena.used > MIB // 2):
                arena.release(*held.pop(rng.randrange(len(held))))
            else:
                held.append(await arena.acquire([rng.randint(1, 20_000), rng.randint(1, 20_000)]))
            ranges = sorted((s.offset, s.offset + s.size) for slots in held for s in slots)
            assert all(a_end <= b for (_, a_end), (b, _) in itertools.pairwise(ranges))
        for slots in held:
            arena.release(*slots)
        assert arena.used == 0
        (whole,) = await arena.acquire([MIB])  # only possible if every hole has merged again
        arena.release(whole)

    asyncio.run(churn())


def test_a_large_item_is_served_before_small_ones_that_came_later(arena):
    async def order():
        (first,) = await arena.acquire([MIB - ALIGNMENT])
        served = []

        async def ask(name, size):
            slots = await arena.acquire([size])
            served.append(name)
            return slots

        large = asyncio.create_task(ask("large", MIB))
        await asyncio.sleep(0)
        small = asyncio.create_task(ask("small", 10))
        await asyncio.sleep(0.01)
        assert served == []  # the small one would fit, but must not starve the large one
        arena.release(first)
        arena.release(*await large)
        arena.release(*await small)
        assert served == ["large", "small"]

    asyncio.run(order())


def test_what_can_never_fit_is_refused_at_once(arena):
    with pytest.raises(TooLarge, match="MiB"):
        asyncio.run(arena.acquire([MIB, ALIGNMENT]))


def test_a_cancelled_wait_leaves_nothing_and_lets_the_next_one_in(arena):
    async def cancel():
        (first,) = await arena.acquire([MIB])
        waiting = asyncio.create_task(arena.acquire([MIB]))
        behind = asyncio.create_task(arena.acquire([ALIGNMENT]))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        arena.release(first)
        arena.release(*await asyncio.wait_for(behind, 1))
        assert arena.used == 0

    asyncio.run(cancel())


def test_cancelled_in_the_moment_of_the_grant_gives_it_back(arena):
    async def race():
        (first,) = await arena.acquire([MIB])
        waiting = asyncio.create_task(arena.acquire([MIB]))
        await asyncio.sleep(0)
        arena.release(first)  # grants
        waiting.cancel()  # before the waiter has run
        await asyncio.gather(waiting, return_exceptions=True)
        assert arena.used == 0

    asyncio.run(race())


def test_the_probe_gets_room_when_the_arena_is_full(arena):
    async def full():
        await arena.acquire([MIB])
        slots = await asyncio.wait_for(arena.acquire([1000, 1000], reserved=True), 1)
        arena.release(*slots)
        assert arena.used == MIB

    asyncio.run(full())
