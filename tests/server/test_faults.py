"""Ranks that die, hang, run out of memory or meet a poison item: accepted work is answered all the same."""

import asyncio
import os
import signal
from functools import partial

import httpx
import pytest

from encode_server.client import EncodeClient, EncodeServerError
from tests.live import eventually
from tests.server.faults import Load, all_equal, encode_all, start, until_in_work

pytestmark = pytest.mark.timeout(600)

SIZE = {"kill": (364, 28), "hang": (392, 28), "memory": (420, 28), "error": (448, 28), "alone": (476, 28)}


@pytest.mark.slow
def test_work_in_flight_survives_the_death_of_a_rank(checkpoint, tmp_path, reference, picture):
    media = [picture(420, 420, seed) for seed in range(40)]
    with start(checkpoint, tmp_path / "s", "--tp", "2", faults=False) as server:
        server.healthy()

        async def killed_meanwhile():
            encoding = asyncio.create_task(encode_all(server, media))
            await until_in_work(server)
            os.kill(server.rank_pids()[1], signal.SIGKILL)
            async with httpx.AsyncClient(timeout=60) as client:
                while (health := await client.get(server.base_url + "/health")).status_code != 503:
                    assert not encoding.done()
            return health, await encoding

        health, results = asyncio.run(killed_meanwhile())
        assert health.status_code == 503 and health.json()["engine"] in ("restarting", "loading")
        assert all_equal(results, reference, media)
        assert httpx.get(server.base_url + "/health").json()["restarts"] == 1
        assert (
            '\nencode_group_restarts_total{cause="died",group="0"} 1.0\n'
            in httpx.get(server.base_url + "/metrics").text
        )
        assert server.terminate() == 0 and server.leftovers() == []


@pytest.mark.slow
def test_poison_is_found_and_its_neighbours_are_answered(checkpoint, tmp_path, reference, picture):
    media = [picture(56, 56, seed) for seed in range(3)]
    with start(checkpoint, tmp_path / "s") as server:
        server.healthy()
        results = asyncio.run(encode_all(server, [media[0], picture(*SIZE["kill"]), media[1], media[2]]))
        poisoned = results.pop(1)
        assert isinstance(poisoned, EncodeServerError) and poisoned.status == 500
        assert all_equal(results, reference, media)
        server.healthy()


@pytest.mark.slow
def test_a_hanging_forward_is_given_up(checkpoint, tmp_path, picture):
    with start(checkpoint, tmp_path / "s", "--stall-s", "2") as server:
        server.healthy()
        (hung,) = asyncio.run(encode_all(server, [picture(*SIZE["hang"])]))
        assert isinstance(hung, EncodeServerError) and hung.status == 500
        assert "has not ended after" in server.log
        server.healthy()


@pytest.mark.slow
def test_out_of_memory_splits_the_batch(checkpoint, tmp_path, reference, picture):
    media = [picture(*SIZE["memory"], seed) for seed in range(12)]
    with start(checkpoint, tmp_path / "s") as server:
        server.healthy()
        assert all_equal(asyncio.run(encode_all(server, media)), reference, media)
        (rank,) = server.rank_pids()
        assert "out of memory" in server.log and "restarting" not in server.log
        assert os.path.exists(f"/proc/{rank}")  # noqa: PTH110


@pytest.mark.slow
def test_out_of_memory_on_one_rank_is_not_waited_for(checkpoint, tmp_path, reference, picture):
    """The other rank waits in a collective for the one that has failed; the batch was too large, and is split."""
    media = [picture(*SIZE["alone"], seed) for seed in range(12)]
    with start(checkpoint, tmp_path / "s", "--tp", "2") as server:
        server.healthy()
        assert all_equal(asyncio.run(encode_all(server, media)), reference, media)
        assert "failed on some ranks only" in server.log and "hang" not in server.log
        assert "batches are now at most" in server.log


@pytest.mark.slow
def test_an_error_of_one_item_spares_the_batch(checkpoint, tmp_path, reference, picture):
    media = [picture(56, 84, seed) for seed in range(6)]
    with start(checkpoint, tmp_path / "s") as server:
        server.healthy()
        results = asyncio.run(encode_all(server, [*media[:3], picture(*SIZE["error"]), *media[3:]]))
        failed = results.pop(3)
        assert isinstance(failed, EncodeServerError) and failed.status == 500
        assert "as the test wants it" not in failed.message  # internals are for the log
        assert all_equal(results, reference, media)


@pytest.mark.slow
def test_too_many_restarts_end_the_process(checkpoint, tmp_path):
    with start(checkpoint, tmp_path / "s", "--max-restarts", "0", faults=False) as server:
        server.healthy()
        os.kill(server.rank_pids()[0], signal.SIGKILL)
        assert server.process.wait(60) == 1
        assert "encode-server: rank 0 exited with SIGKILL" in server.wait_for_log("encode-server: .*")[0]
        assert eventually(lambda: server.leftovers() == [])


@pytest.mark.slow
def test_sigterm_lets_accepted_work_finish(checkpoint, tmp_path, reference, picture):
    media = [picture(420, 420, seed) for seed in range(24)]
    with start(checkpoint, tmp_path / "s", faults=False) as server:
        server.healthy()

        async def terminated_meanwhile():
            encoding = asyncio.create_task(encode_all(server, media))
            await until_in_work(server)
            server.process.send_signal(signal.SIGTERM)
            return await encoding

        results = asyncio.run(terminated_meanwhile())
        answered = [(r, m) for r, m in zip(results, media, strict=True) if not isinstance(r, Exception)]
        refused = [r for r in results if isinstance(r, Exception)]
        # What was accepted is answered; what came too late was told so, or found the door closed.
        assert answered and all_equal([r for r, _ in answered], reference, [m for _, m in answered])
        assert all(not isinstance(r, EncodeServerError) or r.status == 503 for r in refused)
        assert server.process.wait(60) == 0 and server.leftovers() == []


@pytest.mark.slow
def test_a_client_that_goes_away_frees_what_it_held(checkpoint, tmp_path, picture):
    with start(checkpoint, tmp_path / "s", faults=False) as server:
        server.healthy()
        media = [picture(420, 420, seed) for seed in range(80)]

        async def leave():
            async with EncodeClient(server.base_url) as client:
                tasks = [asyncio.create_task(client.encode([item], "image")) for item in media]
                await until_in_work(server)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run(leave())

        def quiet() -> bool:
            lines = httpx.get(server.base_url + "/metrics").text.splitlines()
            values = {line.split()[0]: float(line.split()[1]) for line in lines if line and line[0] != "#"}
            return (
                values["encode_requests_in_progress"]
                == values["encode_arena_used_bytes"]
                == values["encode_queued_items"]
                == 0
                and sum(v for k, v in values.items() if k.startswith("encode_requests_total") and "gone" in k) > 0
            )

        assert eventually(quiet), httpx.get(server.base_url + "/metrics").text
        text = httpx.get(server.base_url + "/metrics").text
        forwarded = [
            line for line in text.splitlines() if line.startswith("encode_stage_seconds_count") and "forward" in line
        ]
        assert not forwarded or float(forwarded[0].split()[-1]) < 80  # most were dropped before their forward


def _recovered(server, times: int) -> bool:
    """Whether ranks were ready once more than so many times. Counted: a pattern with a repeated `.*` takes twice as
    long for each time, and holds the interpreter, so that this process's clients seem to get no answer."""
    return server.log.count("ranks ready after") > times


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_that_follow_each_other_lose_nothing(checkpoint, tmp_path, reference, picture, kills):
    """A second after each recovery: ranks that had got work done are started again immediately."""
    media = [picture(140, 140, seed) for seed in range(8)]
    with start(checkpoint, tmp_path / "s", faults=False) as server:
        server.healthy()

        async def scenario():
            async with Load(server, media) as load:
                for count in range(kills):
                    await load.progress(6)
                    (rank,) = server.rank_pids()
                    os.kill(rank, signal.SIGKILL)
                    recovered = partial(_recovered, server, count + 1)
                    assert await asyncio.to_thread(eventually, recovered, 120)
                    await asyncio.sleep(1)
            assert load.right(reference)

        asyncio.run(scenario())
        assert server.log.count("restarting in 0.00 s") == kills
