"""Healthy means: an encode has just ended, or what is in progress gets on. The probe always answers in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from copy import copy
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from encode_server.errors import BadMedia
from encode_server.pipeline import health
from encode_server.pipeline.health import HealthProbe
from encode_server.pipeline.pipeline import Route
from encode_server.pipeline.request import EncodeRequest
from encode_server.wire.embedding import Encoded, EncodedItem
from encode_server.wire.frames import ItemInfo
from encode_server.wire.modality import Modality
from tests.pipeline.desk import until

MEDIA = {Modality.IMAGE: b"image", Modality.AUDIO: b"audio"}


class House:
    """A probe, and stand-ins for everything it looks at."""

    def __init__(self) -> None:
        self.encodes = self.waiting = 0
        self.gate = asyncio.Event()  # encodes wait for it
        self.gate.set()
        self.encoded_by: list[int | None] = []
        self.hanging: set[int | None] = set()  # groups whose encodes do not end
        self.error: Exception | None = None
        self.values = np.ones((2, 3), np.float32)
        self.engine = SimpleNamespace(
            ready=True, reason="", state="ready", rank_states=["ready"], restarts=0, age=None, limit=60.0
        )
        self.engine.forward_age_s = lambda: self.engine.age
        self.engine.limit_s = lambda: self.engine.limit
        self.preparers = SimpleNamespace(states=["idle"], restarts=0, oldest=None)
        self.preparers.oldest_s = lambda: self.preparers.oldest
        self.work = SimpleNamespace(traffic=0, running={})
        self.batcher = SimpleNamespace(queued=0, in_flight=0, works=[self.work])
        self.engine.groups = [self.engine]
        parts = (cast(Any, part) for part in (self, self.engine, self.preparers, self.batcher))
        self.probe = HealthProbe(*parts, MEDIA, stall_s=60.0)

    async def encode(self, request: EncodeRequest, route: Route) -> Encoded:
        """The pipeline's."""
        assert route.express and route.cache is None
        self.encodes += 1
        self.encoded_by.append(route.group)
        if route.group in self.hanging:
            await asyncio.Event().wait()
        self.waiting += 1
        await self.gate.wait()
        self.waiting -= 1
        if self.error is not None:
            raise self.error
        item = EncodedItem(ItemInfo(2, None, ""), {}, memoryview(self.values.tobytes()))
        return Encoded(request.modality, "stand-in", "float32", 3, [item])

    async def healthy(self) -> bool:
        return (await self.probe.check()).healthy

    async def reason(self) -> str:
        return str((await self.probe.check()).document["reason"])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For encodes that do not end: nobody wants to wait 1.5 s for that."""
    monkeypatch.setattr(health, "ANSWER_S", 0.03)
    monkeypatch.setattr(health, "RECENT_S", -60.0)


def several(house: House, count: int) -> list[Any]:
    """Have the house hold so many groups; their stand-ins."""
    groups = [copy(house.engine) for _ in range(count)]
    for group in groups:
        group.forward_age_s = partial(getattr, group, "age")
        group.limit_s = partial(getattr, group, "limit")
    house.engine.groups = groups
    house.batcher.works = [SimpleNamespace(traffic=0, running={}) for _ in groups]
    parts = (cast(Any, part) for part in (house, house.engine, house.preparers, house.batcher))
    house.probe = HealthProbe(*parts, MEDIA, stall_s=60.0)
    return groups


def run(scenario: Callable[[House], Awaitable[None]]) -> None:
    async def at_house() -> None:
        house = House()
        await scenario(house)
        await house.probe.close()

    asyncio.run(at_house())


def test_an_idle_server_encodes_each_modality() -> None:
    async def scenario(house: House) -> None:
        verdict = await house.probe.check()
        assert verdict.healthy and house.encodes == 2
        modalities = cast(dict[Modality, dict[str, Any]], verdict.document["modalities"])
        assert {modality: state["ok"] for modality, state in modalities.items()} == dict.fromkeys(MEDIA, True)
        assert time.time() - cast(float, verdict.document["last_success"]) < 5

    run(scenario)


def test_simultaneous_probes_share_an_encode() -> None:
    async def scenario(house: House) -> None:
        assert all(await asyncio.gather(*(house.healthy() for _ in range(20))))
        assert house.encodes == 2

    run(scenario)


def test_ranks_that_are_not_ready_are_not_asked() -> None:
    async def scenario(house: House) -> None:
        house.engine.ready, house.engine.reason = False, "rank 0 exited with SIGKILL"
        assert not await house.healthy() and await house.reason() == "rank 0 exited with SIGKILL"
        assert house.encodes == 0

    run(scenario)


def test_a_busy_server_is_judged_by_its_progress() -> None:
    async def scenario(house: House) -> None:
        house.engine.age, house.engine.limit = 4.0, 5.0
        assert await house.healthy() and await house.reason() == "encoding"
        house.engine.age = 6.0
        assert not await house.healthy()
        assert "in flight for 6.0 s, expected within 5.0 s" in await house.reason()
        assert house.encodes == 0

    run(scenario)


def test_an_encode_that_does_not_end_on_an_idle_server_is_no_success(impatient: None) -> None:
    async def scenario(house: House) -> None:
        house.gate.clear()
        assert not await house.healthy()
        assert "on an idle engine did not end" in await house.reason()
        house.gate.set()
        await until(lambda: not house.waiting)
        assert await house.healthy()

    run(scenario)


def test_an_encode_behind_other_work_is_judged_by_that_work(impatient: None) -> None:
    async def scenario(house: House) -> None:
        house.gate.clear()
        assert not await house.healthy()
        house.work.traffic = 1
        house.engine.age, house.engine.limit = 1.0, 5.0
        assert await house.healthy()
        house.engine.age = 6.0
        assert not await house.healthy()

    run(scenario)


def test_preparers_at_work_explain_a_late_encode(impatient: None) -> None:
    async def scenario(house: House) -> None:
        house.gate.clear()
        house.preparers.oldest = 3.2
        assert await house.healthy() and await house.reason() == "preparing for 3.2 s"

    run(scenario)


def test_an_encode_a_moment_ago_makes_up_for_a_late_one_for_a_while(
    impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(house: House) -> None:
        assert await house.healthy()
        house.gate.clear()
        monkeypatch.setattr(health, "RECENT_S", 60.0)
        assert await house.healthy()
        monkeypatch.setattr(health, "RECENT_S", -60.0)
        assert not await house.healthy()

    run(scenario)


def test_an_encode_that_fails_is_told_with_its_modality() -> None:
    async def scenario(house: House) -> None:
        house.error = BadMedia("its decoder crashed")
        verdict = await house.probe.check()
        assert not verdict.healthy and verdict.document["reason"] == "image: its decoder crashed"

    run(scenario)


def test_an_unexpected_error_is_a_failure_and_no_more() -> None:
    async def scenario(house: House) -> None:
        house.error = ZeroDivisionError("oh")
        assert "ZeroDivisionError" in await house.reason()
        house.error = None
        assert await house.healthy()

    run(scenario)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_is_a_failure(value: float) -> None:
    async def scenario(house: House) -> None:
        house.values[1, 2] = value
        assert "not finite" in await house.reason()

    run(scenario)


def test_an_embedding_of_another_size_is_a_failure() -> None:
    async def scenario(house: House) -> None:
        house.values = house.values[:1]
        assert "12 bytes for an embedding of shape (2, 3)" in await house.reason()

    run(scenario)


def test_a_prober_that_leaves_does_not_end_the_encode_of_others() -> None:
    async def scenario(house: House) -> None:
        house.gate.clear()
        leaver = asyncio.create_task(house.healthy())
        stayer = asyncio.create_task(house.healthy())
        await asyncio.sleep(0.005)
        leaver.cancel()
        house.gate.set()
        assert await stayer and house.encodes == 2

    run(scenario)


def told(verdict: health.Verdict) -> dict[int, Any]:
    """What a verdict says of each group."""
    return {index: (group["status"], group["reason"]) for index, group in cast(Any, verdict.document["groups"]).items()}


def test_each_of_several_groups_encodes_for_itself() -> None:
    async def scenario(house: House) -> None:
        several(house, 3)
        verdict = await house.probe.check()
        assert verdict.healthy and sorted(cast(list[int], house.encoded_by)) == [0, 0, 1, 1, 2, 2]
        assert told(verdict) == dict.fromkeys(range(3), ("healthy", "encoded"))
        assert verdict.document["ranks"] == {"0.0": "ready", "1.0": "ready", "2.0": "ready"}

    run(scenario)


def test_one_group_that_encodes_makes_the_server_healthy(impatient: None) -> None:
    async def scenario(house: House) -> None:
        groups = several(house, 3)
        groups[0].ready, groups[0].reason = False, "rank 0 exited with SIGKILL"
        house.hanging.add(1)
        verdict = await house.probe.check()
        assert verdict.healthy and verdict.document["reason"] == "encoded"
        assert told(verdict)[0] == ("unhealthy", "rank 0 exited with SIGKILL")
        assert told(verdict)[1][0] == "unhealthy" and "did not end" in told(verdict)[1][1]
        house.hanging.add(2)
        assert not await house.healthy()

    run(scenario)


def test_a_busy_group_is_judged_by_its_own_progress() -> None:
    async def scenario(house: House) -> None:
        groups = several(house, 2)
        groups[0].age, groups[0].limit = 6.0, 5.0
        groups[1].age, groups[1].limit = 1.0, 5.0
        verdict = await house.probe.check()
        assert verdict.healthy and verdict.document["reason"] == "encoding"
        assert "expected within 5.0 s" in told(verdict)[0][1]
        groups[1].age = 7.0
        assert not await house.healthy()

    run(scenario)


def test_a_group_is_proven_by_encoding_on_it() -> None:
    async def scenario(house: House) -> None:
        several(house, 2)
        assert await house.probe.prove(1) == "" and set(house.encoded_by) == {1}
        house.values[0, 0] = np.nan
        assert "not finite" in await house.probe.prove(0)

    run(scenario)
