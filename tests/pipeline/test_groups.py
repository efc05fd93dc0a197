"""Several groups of ranks share the queue: the one with least work is served, and what one loses the others encode."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from encode_server.engine.group import GroupLost
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import Done
from tests.pipeline.desk import Desk, desk, settle
from tests.pipeline.engine_standin import Batch

OK = Done(0, 0, forward_s=0.01)


def run(scenario: Callable[[Desk], Awaitable[None]], groups: int = 3) -> None:
    async def at_desk() -> None:
        async with desk(100, groups=groups) as d:
            await scenario(d)

    asyncio.run(at_desk())


def well(d: Desk) -> None:
    """From now on every group encodes what it is sent."""
    for group in d.groups:
        group.rule = lambda batch: OK
        for batch in group.open:
            batch.end()


async def learn(d: Desk, seconds_per_patch: float) -> None:
    """Have the batcher learn what a forward takes."""
    rule = lambda batch: Done(0, 0, forward_s=sum(i.output.shape[0] for i in batch.items) * seconds_per_patch)  # noqa: E731
    for group in d.groups:
        group.rule = rule
    for index in range(16):
        await d.submit(f"lesson {index}", 5 + 5 * index)
        await d.ended(f"lesson {index}")
    for group in d.groups:
        group.rule = None


def test_every_group_gets_a_batch_before_one_gets_two() -> None:
    async def scenario(d: Desk) -> None:
        for name in "abc":
            await d.submit(name, 100)
        await settle()
        assert sorted(len(group.open) for group in d.groups) == [1, 1, 1]
        for name in "defg":
            await d.submit(name, 100)
        await settle()
        assert sorted(len(group.open) for group in d.groups) == [2, 2, 2] and d.batcher.queued == 1
        well(d)
        assert set((await d.all_ended()).values()) == {"ok"}

    run(scenario)


def test_a_batch_goes_to_the_group_with_the_least_learnt_work() -> None:
    async def scenario(d: Desk) -> None:
        await learn(d, 0.1)
        for name, cost in (("long", 90), ("short", 10)):
            await d.submit(name, cost)
            await settle()
        (busy,) = [index for index in range(2) if ["long"] in d.sent_to(index)]
        await d.submit("next", 20)
        await settle()
        assert ["next"] in d.sent_to(1 - busy)  # although both execute one batch
        well(d)
        await d.all_ended()

    run(scenario, groups=2)


def test_what_a_group_loses_the_others_encode() -> None:
    async def scenario(d: Desk) -> None:
        for name in "abcdef":
            await d.submit(name, 100)
        await settle()
        lost = [name for batch in d.sent_to(1) for name in batch]
        assert len(lost) == 2
        d.groups[1].lose()
        await settle()
        for group in (d.groups[0], d.groups[2]):
            for batch in group.open:
                batch.end()
        await settle()
        assert not d.groups[0].open and not d.groups[2].open, "a batch was sent again before its ranks were gone"
        d.groups[1].reap()
        for group in (d.groups[0], d.groups[2]):
            group.rule = lambda batch: OK
        assert set((await d.all_ended()).values()) == {"ok"}
        again = d.sent_to(0)[2:] + d.sent_to(2)[2:]
        assert sorted(name for batch in again for name in batch) == sorted(lost)
        d.groups[1].recover()
        await settle()
        for name in "xyz":
            await d.submit(name, 100)
        await settle()
        assert d.sent_to(1)[2:], "the group that came back gets no work"
        well(d)
        assert set((await d.all_ended()).values()) == {"ok"}

    run(scenario)


def test_one_sick_group_costs_nobody_an_item() -> None:
    """It dies of whatever it is sent, and comes back: each batch goes to another group the second time."""

    async def scenario(d: Desk) -> None:
        for group in d.groups:
            group.rule = lambda batch: OK
        d.groups[0].rule = lambda batch: GroupLost("sick", suspect=True)
        for index in range(20):
            await d.submit(str(index), 30)
        assert set((await d.all_ended()).values()) == {"ok"}
        assert d.sent_to(0)

    run(scenario, groups=2)


def test_an_item_that_fails_on_one_group_is_tried_on_another() -> None:
    async def scenario(d: Desk) -> None:
        d.groups[0].rule = lambda batch: Done(0, 0, "RuntimeError: no kernel image is available")
        d.groups[1].rule = lambda batch: OK
        for index in range(8):
            await d.submit(str(index), 30)
        assert set((await d.all_ended()).values()) == {"ok"}
        assert d.sent_to(0)

    run(scenario, groups=2)


def test_an_item_that_fails_on_every_group_is_refused() -> None:
    async def scenario(d: Desk) -> None:
        def rule(batch: Batch) -> Done:
            return Done(0, 0, "ValueError: no" if "bad" in d.names(batch) else "", forward_s=0.01)

        for group in d.groups:
            group.rule = rule
        for name in ("good", "bad", "fine"):
            await d.submit(name, 30)
        assert await d.all_ended() == {"good": "ok", "bad": "encode_failed", "fine": "ok"}

    run(scenario)


def test_poison_ends_two_groups_and_no_third() -> None:
    async def scenario(d: Desk) -> None:
        def rule(batch: Batch) -> Done | GroupLost:
            return GroupLost("died", suspect=True) if "poison" in d.names(batch) else OK

        for group in d.groups:
            group.rule = rule
        await d.submit("poison", 30)
        assert await d.ended("poison") == "encode_failed"
        assert sum(len(group.batches) for group in d.groups) == 2
        assert max(len(group.batches) for group in d.groups) == 1

    run(scenario)


def test_what_proves_a_group_goes_there_and_nowhere_else() -> None:
    async def scenario(d: Desk) -> None:
        d.groups[2].ready = False  # loaded, and not yet proven
        for name in "abcdef":
            await d.submit(name, 100)
        await settle()
        assert not d.groups[2].open
        await d.submit("proof", 10, reserved=True, group=2)
        await settle()
        assert d.sent_to(2) == [["proof"]]
        d.groups[2].open[0].end()
        assert await d.ended("proof") == "ok"
        d.groups[2].recover()
        well(d)
        await d.all_ended()

    run(scenario)


def test_what_was_to_prove_a_lost_group_is_not_sent_to_another() -> None:
    async def scenario(d: Desk) -> None:
        await d.submit("sent", 10, reserved=True, group=1)
        await settle()
        d.groups[1].lose()
        await d.submit("waiting", 10, reserved=True, group=1)
        await settle()
        assert await d.ended("waiting") == "not_ready"
        d.groups[1].recover()
        assert await d.ended("sent") == "not_ready"
        assert not d.sent_to(0) and not d.sent_to(2)

    run(scenario)


def test_the_backlog_grows_and_the_capacity_shrinks_with_a_lost_group() -> None:
    async def scenario(d: Desk) -> None:
        await learn(d, 0.1)
        whole = d.batcher.capacity
        assert whole is not None
        for name in "abcdefgh":
            await d.submit(name, 100)
        await settle()
        backlog_s = d.batcher.backlog_s
        d.groups[0].lose()
        assert round(d.batcher.capacity / whole, 3) == round(2 / 3, 3)
        assert d.batcher.backlog_s > 1.3 * backlog_s
        d.groups[0].recover()
        well(d)
        await d.all_ended()

    run(scenario)


def test_when_no_group_is_left_every_job_ends() -> None:
    async def scenario(d: Desk) -> None:
        for index in range(9):
            await d.submit(str(index), 100)
        await settle()
        for group in d.groups:
            group.give_up("no GPU left")
        assert set((await d.all_ended()).values()) == {"not_ready"}

    run(scenario)


def test_out_of_memory_on_one_group_alone_is_tried_on_another() -> None:
    async def scenario(d: Desk) -> None:
        d.groups[0].rule = lambda batch: Done(0, 0, "CUDA error: out of memory", True)
        d.groups[1].rule = lambda batch: OK
        for index in range(4):
            await d.submit(str(index), 50, modality=Modality.IMAGE)
        assert set((await d.all_ended()).values()) == {"ok"}

    run(scenario, groups=2)
