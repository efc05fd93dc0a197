"""Registrations in every order, and that nothing is kept."""

import asyncio
import itertools

import pytest

from encode_server.delivery.sglang.registrations import Registrations
from encode_server.errors import BadRequest


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("order", set(itertools.permutations(["encode", "rank0", "rank1", "rank1", "done"])))
def test_every_order_delivers_to_each_once(order):
    """`encode`: the part is in work. `done`: its embedding is there. Before `encode` there is no `done`."""
    if order.index("done") < order.index("encode"):
        pytest.skip("no such order")

    async def run():
        registrations = Registrations()
        got: list[str] = []
        ready = asyncio.Event()

        async def encode():
            with registrations.use("r") as registration:
                await ready.wait()
                async for endpoint in registration.arrivals():
                    got.append(endpoint)

        task = None
        for step in order:
            if step == "encode":
                task = asyncio.create_task(encode())
            elif step == "done":
                ready.set()
            elif task is None or not task.done():
                registrations.register("r", step, 2)
            await settle()
        await asyncio.wait_for(task, 1)
        assert sorted(got) == ["rank0", "rank1"]
        assert len(registrations) == 0
        registrations.close()

    asyncio.run(run())


def test_contradictions_are_refused():
    async def run():
        registrations = Registrations()
        registrations.register("r", "a", 2)
        with pytest.raises(BadRequest, match="said 2"):
            registrations.register("r", "b", 3)
        registrations.register("r", "b", 2)
        registrations.register("r", "b", 2)
        with pytest.raises(BadRequest, match="as many"):
            registrations.register("r", "c", 2)
        registrations.close()
        assert len(registrations) == 0

    asyncio.run(run())


def test_what_is_never_encoded_is_forgotten():
    async def run():
        registrations = Registrations(early_s=0.05, max_early=3)
        for index in range(5):
            registrations.register(f"r{index}", "a", 1)
        assert len(registrations) == 3
        with registrations.use("r0") as lost, registrations.use("r4") as kept:
            assert not lost.endpoints and kept.endpoints == ["a"]
            await asyncio.sleep(0.1)
            assert kept.endpoints == ["a"]  # in work: not for the clock to take
        assert len(registrations) == 0

    asyncio.run(run())


def test_parts_that_share_a_req_id_share_its_destinations():
    async def run():
        registrations = Registrations()
        with registrations.use("r") as first:
            with registrations.use("r") as second:
                registrations.register("r", "a", 1)
                assert [e async for e in first.arrivals()] == [e async for e in second.arrivals()] == ["a"]
            assert len(registrations) == 1
        assert len(registrations) == 0

    asyncio.run(run())
