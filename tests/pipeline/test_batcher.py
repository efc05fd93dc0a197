"""What was accepted comes to its end whatever the ranks do, and no slot goes back while they may touch it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from encode_server.engine.group import GroupLost
from encode_server.errors import EncodeFailed, NotReady
from encode_server.pipeline.batcher import Batcher
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.modality import Modality
from encode_server.wire.ranks import Done
from tests.pipeline.desk import Desk, desk, settle
from tests.pipeline.engine_standin import Batch, StandInEngine, WatchedArena

Rule = Callable[[Batch], Done | GroupLost]
OK = Done(0, 0, forward_s=0.01)


def run(scenario: Callable[[Desk], Awaitable[None]], budget: int = 100, **options: int) -> None:
    async def at_desk() -> None:
        async with desk(budget, **options) as d:
            await scenario(d)

    asyncio.run(at_desk())


def poisoned(d: Desk, name: str, outcome: Done | GroupLost) -> Rule:
    """The ranks end so for each batch with that job in it."""
    return lambda batch: outcome if name in d.names(batch) else OK


def test_what_is_queued_leaves_in_batches_within_the_budget() -> None:
    async def scenario(d: Desk) -> None:
        d.engine.rule = lambda batch: OK
        for name in "abcde":
            await d.submit(name, 40)
        assert set((await d.all_ended()).values()) == {"ok"}
        assert d.sent == [["a", "b"], ["c", "d"], ["e"]]

    run(scenario)


def test_one_batch_more_than_is_executed_waits_with_the_ranks() -> None:
    async def scenario(d: Desk) -> None:
        for name in "abcd":
            await d.submit(name, 100)
        await settle()
        assert d.sent == [["a"], ["b"]] and d.batcher.queued == 2
        d.engine.rule = lambda batch: OK
        for batch in d.engine.open:
            batch.end()
        await d.all_ended()

    run(scenario)


def test_an_error_that_nobody_foresaw_ends_the_batcher_and_every_job() -> None:
    """Nobody awaits the task of a batch: lost with it, the error would leave its jobs waiting until their deadlines."""

    async def scenario() -> None:
        engine = StandInEngine()
        batcher = Batcher(engine, dict.fromkeys(Modality, 100), Metrics())
        arena = WatchedArena(1 << 20, [engine])
        d = Desk([engine], batcher, arena, Metrics(), asyncio.create_task(batcher.run()))

        def rule(batch: Batch) -> Done:
            raise RuntimeError("a bug")

        engine.rule = rule
        await d.submit("sent", 100)
        await d.submit("waiting", 100)
        await d.submit("queued", 100)
        with pytest.raises(RuntimeError, match="a bug"):
            await d.running
        assert [job.finished.done() for job in d.jobs.values()] == [True, True, True]
        for job in d.jobs.values():
            with pytest.raises((EncodeFailed, NotReady)):
                await job.finished
        arena.close()

    asyncio.run(scenario())


def test_a_batch_that_is_lost_is_sent_again_as_it_was() -> None:
    async def scenario(d: Desk) -> None:
        await d.submit("a", 40)
        await d.submit("b", 40)
        await settle()
        d.engine.lose()
        await settle()
        assert d.sent == [["a", "b"]]  # nothing is sent before the ranks are back
        d.engine.rule = lambda batch: OK
        d.engine.recover()
        assert await d.all_ended() == {"a": "ok", "b": "ok"}
        assert d.sent == [["a", "b"], ["a", "b"]]

    run(scenario)


def test_what_waited_behind_the_lost_batch_is_not_suspected() -> None:
    """However often the ranks are lost before they have come to it."""

    async def scenario(d: Desk) -> None:
        await d.submit("first", 100)
        await d.submit("behind", 100)
        for _ in range(5):
            await settle()
            assert d.engine.open
            d.engine.lose(suspect=False)
            d.engine.recover()
        d.engine.rule = lambda batch: OK
        await settle()
        for batch in d.engine.open:
            batch.end()
        assert await d.all_ended() == {"first": "ok", "behind": "ok"}

    run(scenario)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_the_item_that_ends_the_ranks_is_found_and_its_neighbours_are_encoded(count: int) -> None:
    async def scenario(d: Desk) -> None:
        d.engine.rule = poisoned(d, "poison", GroupLost("died", suspect=True))
        for index in range(count - 1):
            await d.submit(f"good {index}", 10)
        await d.submit("poison", 10)
        ends = await d.all_ended()
        assert ends.pop("poison") == "encode_failed"
        assert set(ends.values()) <= {"ok"}

    run(scenario)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_kills_from_outside_are_not_blamed_on_what_was_executing(count: int) -> None:
    async def scenario(d: Desk) -> None:
        for index in range(count):
            await d.submit(str(index), 10)
        for _ in range(4):
            await settle()
            assert len(d.engine.open) == 1
            d.engine.lose(outside=True)
            await settle()
            d.engine.recover()
        d.engine.rule = lambda batch: OK
        await settle()
        for batch in d.engine.open:
            batch.end()
        assert set((await d.all_ended()).values()) == {"ok"}

    run(scenario)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_item_that_kills_follow_wherever_it_goes_is_found(count: int) -> None:
    """A kill that the item caused may look as if it came from outside."""

    async def scenario(d: Desk) -> None:
        d.engine.rule = poisoned(d, "poison", GroupLost("killed", suspect=True, outside=True))
        await d.submit("poison", 10)
        for index in range(count - 1):
            await d.submit(f"good {index}", 10)
        ends = await d.all_ended()
        assert ends.pop("poison") == "encode_failed"
        assert set(ends.values()) <= {"ok"}
        assert d.sent.count(["poison"]) in (4, 5)

    run(scenario)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_an_error_of_one_item_spares_its_batch(count: int) -> None:
    async def scenario(d: Desk) -> None:
        d.engine.rule = poisoned(d, "bad", Done(0, 0, "ValueError: no"))
        await d.submit("bad", 10)
        for index in range(count - 1):
            await d.submit(f"good {index}", 10)
        ends = await d.all_ended()
        assert ends.pop("bad") == "encode_failed"
        assert set(ends.values()) <= {"ok"}

    run(scenario)


def memory_for(d: Desk, most: int, outcome: Done | GroupLost) -> Rule:
    """The ranks have memory for batches of `most` tokens."""
    return lambda batch: OK if sum(item.output.shape[0] for item in batch.items) <= most else outcome


@pytest.mark.parametrize(
    "outcome", [Done(0, 0, "out of memory", True), GroupLost("died", suspect=True, out_of_memory=True)]
)
def test_out_of_memory_splits_the_batch_and_lowers_the_budget(outcome: Done | GroupLost) -> None:
    async def scenario(d: Desk) -> None:
        d.engine.rule = memory_for(d, 30, outcome)
        for index in range(8):
            await d.submit(str(index), 10)
        assert set((await d.all_ended()).values()) == {"ok"}
        assert 10 <= d.batcher.budget(Modality.IMAGE) <= 40
        assert d.batcher.budget(Modality.AUDIO) == 100
        before = len(d.sent)
        for index in range(8):
            await d.submit(f"later {index}", 10)
        assert set((await d.all_ended()).values()) == {"ok"}
        assert max(map(len, d.sent[before:])) * 10 <= d.batcher.budget(Modality.IMAGE)

    run(scenario)


def test_an_item_too_large_for_the_memory_fails_alone() -> None:
    async def scenario(d: Desk) -> None:
        d.engine.rule = memory_for(d, 30, Done(0, 0, "out of memory", True))
        await d.submit("small", 10)
        await d.submit("large", 50)
        assert await d.all_ended() == {"small": "ok", "large": "encode_failed"}

    run(scenario)


def test_out_of_memory_beside_another_batch_is_tried_again_alone() -> None:
    async def scenario(d: Desk) -> None:
        await d.submit("a", 100)
        await d.submit("b", 100)
        await settle()
        first, second = d.engine.open
        second.end("out of memory", out_of_memory=True)
        await settle()
        assert d.engine.open == [first]  # "b" waits for the neighbour to end
        d.engine.rule = lambda batch: OK
        first.end()
        assert await d.all_ended() == {"a": "ok", "b": "ok"}
        assert d.batcher.budget(Modality.IMAGE) == 100

    run(scenario, at_once=2)


def test_a_batch_that_only_waits_on_the_device_doubles_no_capacity() -> None:
    """On a GPU two batches are in progress, and the device computes one after the other."""

    async def scenario(d: Desk) -> None:
        cost = d.batcher.costs[Modality.IMAGE]
        for batch in range(1, 17):
            cost.observe(100 * batch, 0, 100.0 * batch)
        assert d.engine.info is not None
        assert d.batcher.capacity == pytest.approx(2.0, rel=0.01)
        await d.submit("a", 100)
        await settle()
        beside_s = d.batcher.backlog_s
        d.engine.info = msgspec.structs.replace(d.engine.info, computing=1)
        assert d.batcher.capacity == pytest.approx(1.0, rel=0.01)
        assert d.batcher.backlog_s > 1.5 * beside_s
        d.engine.open[0].end()
        assert await d.all_ended() == {"a": "ok"}

    run(scenario, at_once=2)


def test_a_large_batch_goes_alone_where_forwards_run_side_by_side() -> None:
    async def scenario(d: Desk) -> None:
        await d.submit("small", 10)
        await settle()
        await d.submit("huge", 90)
        await d.submit("other", 10)
        await settle()
        assert d.sent == [["small"]]
        d.engine.open[0].end()
        await settle()
        assert d.sent == [["small"], ["huge"]]
        d.engine.rule = lambda batch: OK
        d.engine.open[0].end()
        assert set((await d.all_ended()).values()) == {"ok"}

    run(scenario, at_once=4, batch_cost=20)


def test_a_job_whose_time_is_up_in_the_queue_is_not_forwarded() -> None:
    async def scenario(d: Desk) -> None:
        d.engine.rule = lambda batch: OK
        await d.submit("late", 10, deadline_s=-1)
        await d.submit("early", 10)
        assert await d.all_ended() == {"late": "deadline_exceeded", "early": "ok"}
        assert d.sent == [["early"]]

    run(scenario)


def test_what_is_abandoned_in_the_queue_is_not_forwarded() -> None:
    async def scenario(d: Desk) -> None:
        for name in "abc":
            await d.submit(name, 100)
        await settle()
        d.jobs["c"].release()
        d.engine.rule = lambda batch: OK
        for batch in d.engine.open:
            batch.end()
        assert [await d.ended("a"), await d.ended("b")] == ["ok", "ok"]
        await settle()
        assert d.sent == [["a"], ["b"]]

    run(scenario)


def test_what_is_abandoned_while_it_is_encoded_keeps_its_room_until_the_ranks_are_done() -> None:
    async def scenario(d: Desk) -> None:
        job = await d.submit("a", 10)
        await settle()
        job.release()
        await settle()
        assert d.arena.used > 0
        d.engine.open[0].end()
        await settle()
        assert d.arena.used == 0

    run(scenario)


def test_what_is_abandoned_with_lost_ranks_keeps_its_room_until_they_are_gone() -> None:
    async def scenario(d: Desk) -> None:
        job = await d.submit("a", 10)
        await settle()
        d.engine.lose()
        job.release()
        await settle()
        assert d.arena.used > 0
        d.engine.recover()
        await settle()
        assert d.arena.used == 0 and d.sent == [["a"]]

    run(scenario)


def test_what_is_refused_for_ending_the_ranks_keeps_its_room_until_they_are_gone() -> None:
    async def scenario(d: Desk) -> None:
        await d.submit("poison", 10)
        await settle()
        d.engine.lose()
        d.engine.recover()
        await settle()
        d.engine.lose()
        await settle()
        assert d.arena.used > 0
        d.engine.recover()
        assert await d.ended("poison") == "encode_failed"
        await settle()
        assert d.arena.used == 0

    run(scenario)


def test_a_large_item_in_pieces_is_done_when_its_last_piece_is() -> None:
    async def scenario(d: Desk) -> None:
        job = await d.submit("film", 90, 90, 90)
        await settle()
        for piece in range(3):
            assert not job.finished.done(), piece
            d.engine.open[0].end()
            await settle()
        assert await d.ended("film") == "ok"
        rows = [batch.items[0].output for batch in d.engine.batches]
        starts = [row.offset for row in rows]
        assert [row.shape for row in rows] == [(90, 4)] * 3
        assert starts == [starts[0] + index * 90 * 4 * 4 for index in range(3)]  # one embedding, row after row

    run(scenario)


def test_a_large_item_that_fails_in_one_piece_is_forwarded_no_further() -> None:
    async def scenario(d: Desk) -> None:
        await d.submit("film", *[90] * 10)
        await settle()
        running, waiting = d.engine.open
        running.end("ValueError: no")
        await settle()
        assert d.arena.used > 0  # the second piece is with the ranks
        waiting.end()
        assert await d.ended("film") == "encode_failed"
        await settle()
        assert len(d.sent) == 2

    run(scenario)


def test_clients_and_modalities_take_turns() -> None:
    async def scenario(d: Desk) -> None:
        for index in range(20):
            await d.submit(f"greedy {index}", 50, client="greedy")
        await d.submit("modest", 50, client="modest")
        await d.submit("sound", 50, client="greedy", modality=Modality.AUDIO)
        d.engine.rule = lambda batch: OK
        assert set((await d.all_ended()).values()) == {"ok"}
        sent = d.sent
        assert all(any(name in batch for batch in sent[:3]) for name in ("modest", "sound"))

    run(scenario)


def test_a_probe_has_the_next_turn() -> None:
    async def scenario(d: Desk) -> None:
        for index in range(10):
            await d.submit(str(index), 100)
        await settle()
        await d.submit("probe", 10, reserved=True, modality=Modality.AUDIO)
        d.engine.rule = lambda batch: OK
        for batch in d.engine.open:
            batch.end()
        await d.all_ended()
        assert d.sent.index(["probe"]) == 2  # behind the two that the ranks had already

    run(scenario)


def test_probes_alone_are_not_traffic() -> None:
    async def scenario(d: Desk) -> None:
        await d.submit("probe", 10, reserved=True)
        await settle()
        assert (d.batcher.in_flight, d.batcher.works[0].traffic) == (1, 0)
        await d.submit("a", 10)
        await settle()
        assert (d.batcher.in_flight, d.batcher.works[0].traffic) == (2, 1)
        for batch in d.engine.open:
            batch.end()
        await d.all_ended()

    run(scenario)


def test_ranks_that_never_come_back_end_every_job() -> None:
    async def scenario(d: Desk) -> None:
        for name in "abcd":
            await d.submit(name, 100)
        await settle()
        d.engine.give_up("no GPU left")
        assert set((await d.all_ended()).values()) == {"not_ready"}
        await d.submit("late", 10)
        assert await d.ended("late") == "not_ready"

    run(scenario)


def test_a_batcher_that_is_stopped_ends_every_job() -> None:
    async def scenario(d: Desk) -> None:
        for name in "abcd":
            await d.submit(name, 100)
        await settle()
        d.arena.watched = False  # the ranks are being stopped too, and nobody reads what they still write
        d.running.cancel()
        assert set((await d.all_ended()).values()) == {"not_ready"}

    run(scenario)


def test_a_learnt_cost_says_how_long_a_batch_should_take() -> None:
    async def scenario(d: Desk) -> None:
        d.engine.rule = lambda batch: Done(0, 0, forward_s=sum(item.output.shape[0] for item in batch.items) * 1e-3)
        for index in range(12):
            await d.submit(str(index), 10 + 5 * index)
            await d.ended(str(index))
        assert d.engine.batches[0].expected_s is None
        assert d.engine.batches[-1].expected_s == pytest.approx(0.065, rel=0.05)

    run(scenario)
