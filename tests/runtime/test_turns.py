"""However many strangers' pieces are ready, others come between two of them."""

from __future__ import annotations

import asyncio
import time

from encode_server.runtime.turns import FREE_BYTES, ClientTurns, Turns


def test_others_run_between_two_turns_and_cancelled_ones_take_none():
    async def check():
        turns, done, seen = Turns(), 0, []

        async def stranger():
            nonlocal done
            for _ in range(10):
                await turns.wait()
                done += 1

        strangers = [asyncio.create_task(stranger()) for _ in range(100)]
        await asyncio.sleep(0)
        for _ in range(20):
            before = done
            await asyncio.sleep(0)
            seen.append(done - before)
        assert max(seen) == 1
        for task in strangers[:50]:
            task.cancel()
        await asyncio.gather(*strangers, return_exceptions=True)
        assert done >= 500
        async with asyncio.timeout(1):
            await turns.wait()

    asyncio.run(check())


def test_turns_leave_two_thirds_of_the_time_to_others():
    async def check():
        turns, worked = Turns(), 0.0

        async def stranger():
            nonlocal worked
            for _ in range(10):
                await turns.wait()
                began = time.perf_counter()
                time.sleep(0.003)  # noqa: ASYNC251 - what blocks the loop is the matter
                worked += time.perf_counter() - began

        began = time.perf_counter()
        await asyncio.gather(*(stranger() for _ in range(4)))
        assert time.perf_counter() - began > 2.5 * worked

    asyncio.run(check())


def test_a_client_alone_waits_for_nothing_and_of_two_each_has_turns_of_its_own():
    async def check():
        clients, done = 1, {"a": 0, "b": 0}
        turns = ClientTurns(lambda: clients)

        async def piece(client: str):
            await turns.wait(client)
            done[client] += 1

        await asyncio.gather(*(piece("a") for _ in range(5)))
        assert done["a"] == 5
        clients = 2
        pieces = [asyncio.create_task(piece("a")) for _ in range(50)]
        pieces.append(asyncio.create_task(piece("b")))
        for _ in range(4):
            await asyncio.sleep(0)
        assert done["b"] == 1 and done["a"] < 10, "b does not wait for all of a"
        await asyncio.gather(*pieces)

    asyncio.run(check())


def test_only_what_is_large_of_a_body_takes_turns_and_nothing_is_left_of_who_gave_up():
    async def check():
        charged, turns = [], ClientTurns(lambda: 2)

        async def charge(nbytes: int):
            charged.append(nbytes)

        take = turns.charging("a", charge)
        await take(FREE_BYTES)
        waiting = [asyncio.create_task(take(1)) for _ in range(3)]
        await asyncio.sleep(0)
        assert charged == [FREE_BYTES, 1, 1, 1] and not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert not turns._turns, "or each client that ever left would be remembered"

    asyncio.run(check())
