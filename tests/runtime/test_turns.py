"""However many strangers' pieces are ready, others come between two of them."""

from __future__ import annotations

import asyncio

from encode_server.runtime.turns import Turns


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
