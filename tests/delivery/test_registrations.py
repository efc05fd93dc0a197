"""Registrations in every order, and that nothing is kept."""

import asyncio
import itertools

import pytest

from encode_server.delivery.sglang.registrations import Offer, Registrations
from encode_server.errors import BadRequest, TooBusy


def offer(name: str, client: str = "c") -> Offer:
    """A destination of its own on one host."""
    return Offer(f"tcp://10.0.0.1:{ord(name)}", client)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("order", set(itertools.permutations(["encode", "rank0", "rank1", "rank1", "done"])))
def test_every_order_delivers_to_each_once(order):
    """`encode`: the part is in progress. `done`: its embedding is there. Before `encode` there is no `done`."""
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
                registrations.register("r", Offer(f"tcp://{step}:1", "c"), 2)
            await settle()
        await asyncio.wait_for(task, 1)
        assert sorted(got) == ["tcp://rank0:1", "tcp://rank1:1"]
        assert len(registrations) == 0
        registrations.close()

    asyncio.run(run())


def test_contradictions_are_refused():
    async def run():
        registrations = Registrations()
        registrations.register("r", offer("a"), 2)
        with pytest.raises(BadRequest, match="said 2"):
            registrations.register("r", offer("b"), 3)
        registrations.register("r", offer("b"), 2)
        registrations.register("r", offer("b"), 2)
        with pytest.raises(BadRequest, match="as many"):
            registrations.register("r", offer("c"), 2)
        registrations.close()
        assert len(registrations) == 0

    asyncio.run(run())


def test_what_is_never_encoded_is_forgotten():
    async def run():
        registrations = Registrations(early_s=0.05, max_early=3)
        for index in range(5):
            registrations.register(f"r{index}", offer("a"), 1)
        assert len(registrations) == 3
        with registrations.use("r0") as lost, registrations.use("r4") as kept:
            assert not lost.endpoints and kept.endpoints == ["tcp://10.0.0.1:97"]
            await asyncio.sleep(0.1)
            assert kept.endpoints == ["tcp://10.0.0.1:97"]  # a part in progress: its destinations do not expire
        assert len(registrations) == 0

    asyncio.run(run())


def test_parts_that_share_a_req_id_share_its_destinations():
    async def run():
        registrations = Registrations()
        with registrations.use("r") as first:
            with registrations.use("r") as second:
                registrations.register("r", offer("a"), 1)
                assert (
                    [e async for e in first.arrivals()] == [e async for e in second.arrivals()] == ["tcp://10.0.0.1:97"]
                )
            assert len(registrations) == 1
        assert len(registrations) == 0

    asyncio.run(run())


def test_a_strangers_destination_gets_nothing_and_stands_in_nobodys_way():
    async def run():
        registrations = Registrations()
        registrations.register("r", Offer("tcp://6.6.6.6:1", "stranger"), 1)
        registrations.register("r", Offer("tcp://10.0.0.1:1", "prefill"), 2)
        with registrations.use("r", lambda offer: offer.address == "10.0.0.1") as registration:
            registrations.register("r", Offer("tcp://10.0.0.1:2", "prefill"), 2)
            assert [e async for e in registration.arrivals()] == ["tcp://10.0.0.1:1", "tcp://10.0.0.1:2"]
        assert len(registrations) == 0
        registrations.close()

    asyncio.run(run())


def test_another_part_of_the_req_id_does_not_decide_who_gets_this_one():
    """Part 1 may come from a stranger who guessed the req_id: part 0's embedding must not go to the stranger's host."""

    async def run():
        registrations = Registrations()
        with (
            registrations.use("r", lambda offer: offer.address == "10.0.0.1") as mine,
            registrations.use("r", lambda offer: offer.address == "6.6.6.6") as strange,
        ):
            registrations.register("r", Offer("tcp://6.6.6.6:1", "stranger"), 1)
            registrations.register("r", Offer("tcp://10.0.0.1:1", "prefill"), 1)
            assert [e async for e in mine.arrivals()] == mine.endpoints == ["tcp://10.0.0.1:1"]
            assert [e async for e in strange.arrivals()] == ["tcp://6.6.6.6:1"]
        registrations.close()

    asyncio.run(run())


def test_one_clients_registrations_push_out_their_own():
    async def run():
        registrations = Registrations(max_early=10)
        registrations.register("victim", offer("a", "victim"), 1)
        for index in range(50):
            registrations.register(f"r{index}", offer("b", "stranger"), 1)
        assert len(registrations) == 10
        with registrations.use("victim") as kept:
            assert kept.endpoints
        registrations.close()
        assert len(registrations) == 0

    asyncio.run(run())


def test_one_req_id_has_so_many_destinations():
    async def run():
        registrations = Registrations()
        with pytest.raises(TooBusy):
            for index in range(1000):
                registrations.register("r", Offer(f"tcp://10.0.{index // 250}.{index % 250}:1", "c"), 64)
        registrations.close()

    asyncio.run(run())
