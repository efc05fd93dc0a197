"""Whatever order things happen in: each job ends exactly once, and every byte of the arena comes back."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encode_server.wire.modality import Modality
from tests.pipeline.desk import Desk, desk, settle
from tests.pipeline.engine_standin import Batch

costs = st.lists(st.integers(1, 120), min_size=1, max_size=4)
events = st.one_of(
    st.tuples(st.just("submit"), costs, st.sampled_from(Modality), st.sampled_from("ab"), st.booleans()),
    st.tuples(st.just("submit late"), costs),
    st.tuples(st.just("done"), st.integers(0, 5)),
    st.tuples(st.just("error"), st.integers(0, 5)),
    st.tuples(st.just("out of memory"), st.integers(0, 5)),
    st.tuples(st.just("lose"), st.integers(0, 2), st.booleans(), st.booleans()),
    st.tuples(st.just("reap"), st.integers(0, 2)),
    st.tuples(st.just("recover"), st.integers(0, 2)),
    st.tuples(st.just("release"), st.integers(0, 30)),
    st.tuples(st.just("settle")),
)


class Story:
    """Plays events."""

    def __init__(self, d: Desk) -> None:
        self.d = d

    async def play(self, event: tuple[Any, ...]) -> None:
        groups = self.d.groups
        running = [batch for group in groups for batch in group.open]
        match event:
            case ("submit", job_costs, modality, client, reserved):
                await self.submit(job_costs, modality=modality, client=client, reserved=reserved)
            case ("submit late", job_costs):
                await self.submit(job_costs, deadline_s=-1.0)
            case ("done" | "error" | "out of memory" as what, index) if running:
                batch = running[index % len(running)]
                batch.end("" if what == "done" else what, out_of_memory=what == "out of memory")
            case ("lose", index, suspect, out_of_memory) if (group := groups[index % len(groups)]).ready:
                group.lose(suspect=suspect, out_of_memory=out_of_memory)
            case ("reap", index):
                groups[index % len(groups)].reap()
            case ("recover", index) if not (group := groups[index % len(groups)]).ready:
                group.recover()
            case ("release", index) if self.d.jobs:
                list(self.d.jobs.values())[index % len(self.d.jobs)].release()
            case ("settle",):
                await settle()

    async def submit(self, job_costs: list[int], **options: Any) -> None:
        name = str(len(self.d.jobs))
        await self.d.submit(name, *job_costs, **options)

    async def finish(self) -> None:
        """Let the ranks work well from now on, until all is quiet."""
        for group in self.d.groups:
            if not group.ready:
                group.recover()
        for _ in range(1000):
            await settle()
            running = [batch for group in self.d.groups for batch in group.open]
            if not running:
                return
            for batch in running:
                batch.end()
        raise AssertionError("the batcher sends without end")


def well(batch: Batch) -> bool:
    """Whether the ranks encoded the batch."""
    return batch.outcome.exception() is None and not batch.outcome.result()[0].error


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(events, max_size=40), st.sampled_from([1, 2]), st.sampled_from([1, 3]))
def test_each_job_ends_exactly_once_and_everything_is_given_back(
    story: list[tuple[Any, ...]], at_once: int, groups: int
) -> None:
    async def scenario() -> None:
        faults: list[dict[str, Any]] = []  # a second end of a job raises in the batcher
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        async with desk(100, at_once=at_once, arena_bytes=8 << 20, groups=groups) as d:
            played = Story(d)
            for event in story:
                await played.play(event)
            released = {name for name, job in d.jobs.items() if job.abandoned and not job.finished.done()}
            await played.finish()
            encoded = Counter(
                id(item) for group in d.groups for batch in group.batches if well(batch) for item in batch.items
            )
            for name, job in d.jobs.items():
                # A job that its owner released need not end: nobody waits for it.
                assert job.finished.done() or name in released, name
                if job.finished.done() and job.finished.exception() is None:
                    assert [encoded[id(piece.item)] for piece in job.pieces] == [1] * len(job.pieces)
                job.release()
            await settle()
            assert d.arena.used == d.arena.violations == d.batcher.queued == 0
            assert not faults and not d.running.done()

    asyncio.run(scenario())
