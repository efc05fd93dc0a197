"""One server under a load, simulated: the batcher and its queue are the server's own code, in virtual time.

What is around them is modelled. Preparing takes a thread and a core; a forward takes one of the places that
compute, and on a CPU a core; the front does one request after the other. Cores go to who asked first.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from encode_server.bench.goodput import Objective, Step
from encode_server.bench.virtual import simulated
from encode_server.engine.region import Slot
from encode_server.errors import StartupError
from encode_server.pipeline.batcher import Batcher
from encode_server.pipeline.jobs import Job
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.modality import Modality
from encode_server.wire.preparers import PreparedItem, PreparedPiece
from encode_server.wire.ranks import Done, EncoderInfo, ItemRef

DTYPE, DIM = "float32", 1  # of no consequence here


@dataclass(frozen=True)
class Kind:
    """What a request's items cost. `front_s`: of a request, `prepare_s`, `copy_s`: of an item, `forward_s`: what an
    item adds to a forward. `weight`: how often such a request comes."""

    modality: Modality
    patches: int
    items: int
    weight: float
    front_s: float
    prepare_s: float
    copy_s: float
    forward_s: float


@dataclass(frozen=True)
class Machine:
    """What one server works with, see `service.status.Capacity`. `groups`: of ranks. `fixed_s`: of a forward as
    such, by modality. `on_cores`: forwards take cores. `hit_rate`: part of the requests that the cache answers."""

    cores: int
    threads: int
    at_once: int
    computing: int
    batch_cost: int | None
    budgets: dict[Modality, int]
    fixed_s: dict[Modality, float]
    on_cores: bool
    hit_rate: float = 0.0
    groups: int = 1


def simulate(kinds: Sequence[Kind], machine: Machine, rate: float, seconds: float, objective: Objective) -> Step:
    """What comes of `rate` requests a second, that arrive at random for `seconds`."""
    return simulated(_Server(kinds, machine).serve(rate, seconds, objective))


def machine_of(bench: dict[str, Any], *, cores: int | None, threads: int | None, hit_rate: float) -> Machine:
    """The server that a bench's JSON is of. Raises StartupError where the JSON does not say."""
    server = bench.get("server") or {}
    capacity = server.get("capacity")
    if not capacity or not bench.get("profile"):
        raise StartupError("the file has no costs: make it by `encode-server bench URL --objective-ms MS --json FILE`")
    on_cores = server.get("device") == "cpu"
    fixed = {name: max(0.0, parts[0]) if parts else 0.0 for name, parts in capacity["costs"].items()}
    return Machine(
        cores=cores or capacity["cores"],
        threads=threads or capacity["preparer_threads"],
        at_once=capacity["at_once"],
        computing=capacity.get("computing", capacity["at_once"] if on_cores else 1),  # older servers do not say
        batch_cost=capacity["batch_cost"],
        budgets={Modality(name): budget for name, budget in capacity["budgets"].items()},
        fixed_s={Modality(name): seconds for name, seconds in fixed.items()},
        on_cores=on_cores,
        hit_rate=hit_rate,
        groups=capacity["dp"],
    )


def kinds_of(bench: dict[str, Any], machine: Machine, shares: Sequence[tuple[str, int, float]]) -> list[Kind]:
    """What requests cost, from a bench's JSON. `shares`: media, items, weight. Raises StartupError for media that the
    bench did not measure."""
    known = {entry["media"]: entry for entry in bench["profile"]}
    kinds = []
    for media, items, weight in shares:
        if (entry := known.get(media)) is None:
            raise StartupError(f"the bench has not measured {media!r}, only {', '.join(sorted(known))}")
        modality, stages = Modality(entry["modality"]), entry["stages_s"]
        kinds.append(
            Kind(
                modality=modality,
                patches=max(1, entry["patches"]),
                items=items,
                weight=weight,
                front_s=max(0.0, entry["total_s"] - sum(stages.values())),
                prepare_s=stages["preprocess"],
                copy_s=stages["copy"],
                # No item costs nothing: a fixed cost learnt from batches of one size may be too high.
                forward_s=max(stages["forward"] - machine.fixed_s.get(modality, 0.0), 0.1 * stages["forward"]),
            )
        )
    return kinds


class _Group:
    """A group of ranks: forwards that take as long as their items say. `costs`: seconds of each item, by its
    identity."""

    ready = loaded = True

    def __init__(self, machine: Machine, cores: asyncio.Semaphore, costs: dict[int, float], info: EncoderInfo) -> None:
        self._machine, self._cores, self._costs, self.info = machine, cores, costs, info
        self._places = asyncio.Semaphore(machine.computing)

    async def forward(
        self, modality: Modality, items: tuple[ItemRef, ...], expected_s: float | None = None
    ) -> list[Done]:
        seconds = self._machine.fixed_s.get(modality, 0.0) + sum(self._costs.pop(id(item)) for item in items)
        async with self._places:
            await _work(seconds, self._cores if self._machine.on_cores else None)
        return [Done(0, 0, forward_s=seconds)]


class _Engine:
    """The groups of ranks, none of which ever fails."""

    over = None

    def __init__(self, machine: Machine, cores: asyncio.Semaphore) -> None:
        self.costs: dict[int, float] = {}
        at_once, computing = machine.at_once, machine.computing
        self.info = EncoderInfo(
            "simulated", {}, DTYPE, "simulated", 0, at_once, machine.batch_cost, computing=computing
        )
        self.groups = [_Group(machine, cores, self.costs, self.info) for _ in range(machine.groups)]

    async def changed(self) -> None:
        await asyncio.Event().wait()


class _Arena:
    """Room for everything."""

    async def acquire(self, sizes: Sequence[int], *, reserved: bool) -> list[Slot]:
        return [Slot(0, size) for size in sizes]

    def release(self, *slots: Slot) -> None:
        """Nothing is held."""


class _Server:
    def __init__(self, kinds: Sequence[Kind], machine: Machine) -> None:
        self._kinds, self._machine = kinds, machine

    async def serve(self, rate: float, seconds: float, objective: Objective) -> Step:
        machine, choice = self._machine, random.Random(0)
        self._cores = asyncio.Semaphore(machine.cores)
        self._threads, self._front = asyncio.Semaphore(machine.threads), asyncio.Semaphore(1)
        self._engine, self._arena = _Engine(machine, self._cores), _Arena()
        self._batcher = Batcher(self._engine, machine.budgets, Metrics(groups=machine.groups))
        batching = asyncio.create_task(self._batcher.run())
        step, loop = Step(rate, seconds=seconds), asyncio.get_running_loop()
        weights = [kind.weight for kind in self._kinds]
        warm, due = 0.1 * seconds, 0.0
        async with asyncio.TaskGroup() as requests:
            while (due := due + choice.expovariate(rate)) < warm + seconds:
                await asyncio.sleep(due - loop.time())
                kind = choice.choices(self._kinds, weights)[0]
                hit = choice.random() < machine.hit_rate
                requests.create_task(self._request(kind, hit, step if due >= warm else Step(rate), objective))
        batching.cancel()
        await asyncio.gather(batching, return_exceptions=True)
        return step

    async def _request(self, kind: Kind, hit: bool, step: Step, objective: Objective) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with self._front:
            await _work(kind.front_s, self._cores)
        if not hit:
            await asyncio.gather(*(self._item(kind) for _ in range(kind.items)))
        took = loop.time() - began
        step.due += 1
        step.latencies.append(took)
        if took <= objective.seconds:
            step.in_time += 1
            step.items += kind.items

    async def _item(self, kind: Kind) -> None:
        async with self._threads:
            await _work(kind.prepare_s, self._cores)
        job = Job(self._arena, kind.modality, math.inf)  # type: ignore[arg-type]  # a stand-in
        piece = PreparedPiece((), 1, kind.patches, 0)
        await job.acquire(PreparedItem((piece,), 0, None, {}), DIM, DTYPE)
        await asyncio.sleep(kind.copy_s)
        self._engine.costs.update((id(piece.item), kind.forward_s) for piece in job.pieces)
        self._batcher.submit(job)
        await job.finished
        job.release()


async def _work(seconds: float, cores: asyncio.Semaphore | None) -> None:
    if cores is None:
        await asyncio.sleep(seconds)
        return
    async with cores:
        await asyncio.sleep(seconds)
