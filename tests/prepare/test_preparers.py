"""A preparer may end at any moment: its items come to their end all the same, and only the guilty one is refused."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from encode_server.errors import BadMedia, EncodeError, NotReady, StartupError, TooLarge
from encode_server.prepare import preparers
from encode_server.wire.modality import Modality
from encode_server.wire.preparers import PreparedItem
from tests.pipeline.desk import until
from tests.prepare.kitchen import Kitchen, kitchen

Scenario = Callable[[Kitchen], Awaitable[None]]
Run = Callable[..., None]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def play(scenario: Scenario, **options: Any) -> None:
        async def scene() -> None:
            async with kitchen(tmp_path, **options) as k:
                await scenario(k)

        asyncio.run(scene())

    return play


def test_tensors_lie_where_the_room_is(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        results = await asyncio.gather(k.prepare("a 1"), k.prepare("b 300"), k.prepare("c 70000"))
        assert results == [b"a", b"b" * 300, b"c" * 70_000]
        assert k.preparers.states == ["idle"] and k.preparers.restarts == 0

    run(scenario)


@pytest.mark.parametrize("end", ["crash", "exit", "kill"])
def test_an_item_whose_process_dies_is_prepared_again(run: Run, end: str) -> None:
    async def scenario(k: Kitchen) -> None:
        assert await k.prepare(f"x once:{k.tmp}/first {end}") == b"x" * 256
        assert k.preparers.restarts == 1

    run(scenario)


@pytest.mark.parametrize(("end", "deaths"), [("crash", 2), ("exit", 2), ("kill", 3)])
def test_an_item_that_ends_every_process_is_refused(
    run: Run, end: str, deaths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody knows whether a SIGKILL came from outside, one more of them is needed."""
    monkeypatch.setattr(preparers.OomKills, "count", lambda self: None)

    async def scenario(k: Kitchen) -> None:
        with pytest.raises(BadMedia, match="its decoder crashed"):
            await k.prepare(f"x {end}")
        await until(lambda: k.preparers.restarts == deaths)
        assert await k.prepare("y") == b"y" * 256

    run(scenario)


def test_the_neighbours_of_an_item_that_ends_its_process_are_prepared(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        gate = k.gate()
        neighbours = [k.begin(f"{letter} {gate}") for letter in "abc"]
        await gate.reached()
        poison = k.begin("x crash")
        await until(lambda: k.preparers.restarts > 0)
        gate.open()
        assert await asyncio.gather(*neighbours) == [letter * 256 for letter in (b"a", b"b", b"c")]
        with pytest.raises(BadMedia, match="its decoder crashed"):
            await poison

    run(scenario, threads=4)


@pytest.mark.parametrize(("known", "kills"), [(True, 5), (False, 2)])
def test_kills_from_outside_are_not_blamed_on_the_item(
    run: Run, known: bool, kills: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many, where the kernel counts the processes that it kills itself."""
    monkeypatch.setattr(preparers.OomKills, "count", lambda self: 3 if known else None)

    async def scenario(k: Kitchen) -> None:
        gate = k.gate()
        item = k.begin(f"x {gate}")
        for _ in range(kills):
            await gate.reached()
            k.signal(signal.SIGKILL)
        await gate.reached()
        gate.open()
        assert await item == b"x" * 256

    run(scenario)


def test_an_item_for_which_the_kernel_kills_every_process_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = itertools.count()
    monkeypatch.setattr(preparers.OomKills, "count", lambda self: next(counts))

    async def scenario(k: Kitchen) -> None:
        with pytest.raises(BadMedia, match="its decoder crashed"):
            await k.prepare("x kill")

    run(scenario)


def test_strangers_cannot_end_the_server_by_crashing_decoders(run: Run) -> None:
    """A preparer that never prepared anything may be broken, or may have met bad items only."""

    async def scenario(k: Kitchen) -> None:
        for _ in range(preparers.MAX_BARREN):
            with pytest.raises(BadMedia):
                await k.prepare("x crash")
        assert await k.prepare("y") == b"y" * 256

    run(scenario)


def test_overtime_is_too_large_and_spares_the_neighbours(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        gate = k.gate()
        neighbour = k.begin(f"a {gate}")
        slow = k.begin(f"x {k.gate('never')}")
        await gate.reached()
        await k.gate("never").reached()
        k.shift_back(f"x {k.gate('never')}", 46.0)
        with pytest.raises(TooLarge, match="takes longer than 30 s"):
            await slow
        gate.open()
        assert await neighbour == b"a" * 256
        await until(lambda: k.preparers.restarts == 1)

    run(scenario)


def test_a_copy_that_stalls_does_not_take_back_the_verdict_about_a_slow_decode(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        never, slow_copy = k.gate("never"), k.tmp / "slow_copy"
        slow = k.begin(f"x {never}")
        await never.reached()
        slow_copy.touch()
        copying = k.begin("c")
        await until(Path(f"{slow_copy}.begun").exists)
        k.shift_back(f"x {never}", 46.0)
        k.shift_back("c", 46.0)
        with pytest.raises(TooLarge, match="takes longer than 30 s"):
            await slow
        slow_copy.unlink()
        assert await copying == b"c" * 256
        await until(lambda: k.preparers.restarts == 1)
        assert k.metrics.preparer_restarts["overtime"]._value.get() == 1

    run(scenario)


def test_a_stopped_process_is_replaced_and_its_items_are_prepared(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparers, "IDLE_S", 0.2)

    async def scenario(k: Kitchen) -> None:
        gate = k.gate()
        items = [k.begin(f"{letter} {gate}") for letter in "ab"]
        await gate.reached()
        k.signal(signal.SIGSTOP)
        gate.open()
        assert await asyncio.gather(*items) == [b"a" * 256, b"b" * 256]
        assert k.preparers.restarts >= 1

    run(scenario)


def test_a_process_that_stops_while_it_starts_is_replaced(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparers, "START_IDLE_S", 0.2)
    (tmp_path / "stops_early").touch()

    async def scenario(k: Kitchen) -> None:
        assert await k.prepare("x") == b"x" * 256
        assert k.preparers.restarts >= 1

    run(scenario)


def test_an_item_whose_decoder_waits_for_ever_is_refused_in_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not begun again and again, at the cost of its neighbours."""
    monkeypatch.setattr(preparers, "IDLE_S", 0.2)

    async def scenario(k: Kitchen) -> None:
        item = k.begin("x hang")
        with pytest.raises(BadMedia, match="its decoder hangs"):
            await item
        assert await k.prepare("y") == b"y" * 256

    run(scenario)


def test_out_of_memory_beside_others_is_tried_again_alone(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        gate = k.gate()
        neighbour = k.begin(f"a {gate}")
        await gate.reached()
        hungry = k.begin(f"x once:{k.tmp}/first memory")
        await until(lambda: k.preparers.queued == 1)  # waits for the process to be empty
        gate.open()
        assert await neighbour == b"a" * 256 and await hungry == b"x" * 256
        assert k.preparers.restarts == 0

    run(scenario)


def test_out_of_memory_alone_is_the_items_error(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        with pytest.raises(EncodeError):
            await k.prepare("x memory")
        assert await k.prepare("y") == b"y" * 256

    run(scenario)


def test_bad_media_is_its_own_error(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        with pytest.raises(BadMedia):
            await k.prepare("x bad")

    run(scenario)


def test_long_items_leave_a_quarter_of_the_threads(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        gate = k.gate()
        films = [k.begin(f"{index} {gate}", modality=Modality.VIDEO) for index in range(6)]
        await until(lambda: k.preparers.queued == 3)
        assert [await k.prepare(f"{letter}") for letter in "abc"] == [letter * 256 for letter in (b"a", b"b", b"c")]
        assert k.preparers.queued == 3
        gate.open()
        await asyncio.gather(*films)

    run(scenario, threads=4)


def test_a_probe_passes_when_every_thread_is_taken(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        gate = k.gate()
        items = [k.begin(f"{index} {gate}") for index in range(5)]
        await gate.reached()
        assert await k.prepare("p", express=True) == b"p" * 256
        gate.open()
        await asyncio.gather(*items)

    run(scenario)


async def cancelled(task: asyncio.Task[bytes]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_caller_that_goes_frees_its_thread(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        gate = k.gate()
        running, queued = k.begin(f"a {gate}"), k.begin("b")
        await gate.reached()
        await cancelled(queued)
        await cancelled(running)
        assert k.preparers.queued == 0
        gate.open()
        assert await k.prepare("c") == b"c" * 256
        assert len(k.asked) == 1

    run(scenario, threads=1)


def test_a_caller_that_goes_while_it_waits_for_room_frees_what_was_held(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparers, "MAX_HELD", 1)  # nothing is begun while anything is held

    async def scenario(k: Kitchen) -> None:
        async def for_ever(item: PreparedItem) -> None:
            await asyncio.Event().wait()

        held = k.begin("a", then=for_ever)
        await until(lambda: len(k.asked) == 1)
        waiting = k.begin("b")
        await asyncio.sleep(0.02)
        assert k.preparers.queued == 1
        await cancelled(held)
        assert await waiting == b"b" * 256

    run(scenario)


def test_a_caller_that_goes_in_the_moment_its_item_is_prepared_frees_what_was_held(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparers, "MAX_HELD", 1)

    async def scenario(k: Kitchen) -> None:
        gate = k.gate()
        item = k.begin(f"a {gate}")
        await gate.reached()
        gate.open()
        time.sleep(0.2)  # noqa: ASYNC251 - the preparer's message arrives, and the loop has not seen it
        await cancelled(item)
        assert await k.prepare("b") == b"b" * 256

    run(scenario)


def test_room_is_asked_for_again_when_the_process_is_lost_meanwhile(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        async def kill(item: PreparedItem) -> None:
            if len(k.asked) == 1:
                os.kill(int(item.extra["pid"]), signal.SIGKILL)  # type: ignore[arg-type]
                await until(lambda: k.preparers.restarts == 1)

        assert await k.prepare("a", then=kill) == b"a" * 256
        assert len(k.asked) == 2

    run(scenario)


def test_a_process_lost_while_it_copies_is_made_up_for(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        slow = k.tmp / "slow_copy"
        slow.touch()
        item = k.begin("a")
        await until(Path(f"{slow}.begun").exists)
        k.signal(signal.SIGKILL)
        slow.unlink()
        assert await item == b"a" * 256
        assert len(k.asked) == 2

    run(scenario)


def test_room_is_kept_until_the_copy_has_ended_however_often_the_caller_is_cancelled(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        slow = k.tmp / "slow_copy"
        slow.touch()
        item = k.begin("a")
        await until(Path(f"{slow}.begun").exists)
        for _ in range(3):
            item.cancel()
            await asyncio.sleep(0.02)
            assert not item.done() and k.arena.used > 0
        slow.unlink()
        with pytest.raises(asyncio.CancelledError):
            await item

    run(scenario)


def test_a_killed_forkserver_takes_the_preparers_along_and_nothing_is_lost(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        gate = k.gate()
        items = [k.begin(f"{letter} {gate}") for letter in "abc"]
        await gate.reached()
        pid = k.forkserver.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        gate.open()
        assert await asyncio.gather(*items) == [letter * 256 for letter in (b"a", b"b", b"c")]
        assert k.forkserver.pid != pid

    run(scenario, processes=2)


def test_pickles_are_asked_for_again_when_their_process_is_lost(run: Run) -> None:
    async def scenario(k: Kitchen) -> None:
        assert (await k.preparers.pickle("float32", None, None)).dtype == b"dtype"
        k.signal(signal.SIGSTOP)
        asked = asyncio.create_task(k.preparers.pickle("float32", None, None))
        await asyncio.sleep(0.02)
        k.signal(signal.SIGKILL)
        assert (await asked).dtype == b"dtype"

    run(scenario)


def test_items_in_progress_end_when_the_server_stops(tmp_path: Path) -> None:
    async def scene() -> None:
        async with kitchen(tmp_path, threads=1) as k:
            (tmp_path / "slow_copy").touch()
            copying = k.begin("a")
            await until((tmp_path / "slow_copy.begun").exists)
            preparing, queued = k.begin(f"b {k.gate()}"), k.begin("c")
            await k.gate().reached()
            k.signal(signal.SIGSTOP)
            pickling = asyncio.create_task(k.preparers.pickle("float32", None, None))
            await asyncio.sleep(0)
            copying.cancel()
        for task in (preparing, queued, pickling):
            with pytest.raises(NotReady, match="stopping"):
                await task
        with pytest.raises(asyncio.CancelledError):
            await copying
        with pytest.raises(NotReady):
            await k.prepare("d")

    asyncio.run(asyncio.wait_for(scene(), 20))


def test_processors_that_cannot_be_loaded_end_the_server_with_their_message(tmp_path: Path) -> None:
    (tmp_path / "cannot_load").write_text("preprocessor_config.json is missing")

    async def scene() -> None:
        with pytest.raises(StartupError, match=r"preprocessor_config\.json is missing"):
            async with kitchen(tmp_path):
                pass

    asyncio.run(scene())


def test_processes_that_end_before_they_prepare_anything_end_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparers, "MAX_BARREN", 1)
    (tmp_path / "dies_early").touch()

    async def scene() -> None:
        with pytest.raises(StartupError, match="end before they prepare anything: code 9"):
            async with kitchen(tmp_path):
                pass

    asyncio.run(scene())
