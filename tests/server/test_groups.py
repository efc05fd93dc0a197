"""A server with several groups of ranks: one of them is killed or hangs under load, and nobody notices."""

from __future__ import annotations

import asyncio
import os
import signal

import httpx
import pytest

from tests.live import eventually
from tests.server.faults import FAULTS, Load, start

pytestmark = pytest.mark.timeout(300)


def states(server) -> list[str]:
    """What `/health` says of each group; the whole must be healthy."""
    answer = httpx.get(server.base_url + "/health", timeout=30)
    assert answer.status_code == 200, answer.text
    return [group["engine"] for group in answer.json()["groups"].values()]


def test_a_group_that_is_killed_under_load_is_missed_by_nobody(checkpoint, tmp_path, reference, picture):
    media = [picture(140, 140, seed) for seed in range(8)]
    with start(checkpoint, tmp_path / "s", "--dp", "2", faults=False) as server:
        server.healthy()
        assert eventually(lambda: states(server) == ["ready", "ready"])

        async def scenario():
            async with Load(server, media) as load:
                await load.progress(4)
                os.kill(server.rank_pids()[1], signal.SIGKILL)
                async with httpx.AsyncClient(base_url=server.base_url, timeout=30) as client:
                    ready = "ready"
                    while ready == "ready":
                        health = await client.get("/health")
                        assert health.status_code == 200 and (await client.get("/readyz")).status_code == 200
                        ready = health.json()["groups"]["1"]["engine"]
                    while ready != "ready":
                        health = await client.get("/health")
                        assert health.status_code == 200
                        ready = health.json()["groups"]["1"]["engine"]
                await load.progress(6)
            assert load.right(reference)

        asyncio.run(scenario())
        assert "group 1: ranks lost (rank 0 exited with SIGKILL); restarting in 0.00 s" in server.log
        text = httpx.get(server.base_url + "/metrics").text
        assert 'encode_group_restarts_total{cause="died",group="1"} 1.0' in text
        assert 'encode_group_up{group="0"} 1.0' in text and 'encode_group_up{group="1"} 1.0' in text
        assert 'encode_rank_up{group="1",rank="0"} 1.0' in text
        assert len(server.rank_pids()) == 2
        assert server.terminate() == 0 and server.leftovers() == []


@pytest.mark.slow
def test_a_group_that_is_stopped_is_found_while_the_others_go_on(checkpoint, tmp_path, reference, picture):
    media = [picture(140, 140, seed) for seed in range(8)]
    with start(checkpoint, tmp_path / "s", "--dp", "3", "--tp", "2", faults=False) as server:
        server.healthy()
        assert eventually(lambda: states(server) == ["ready"] * 3)

        async def scenario():
            async with Load(server, media, clients=8) as load:
                await load.progress(20)
                os.kill(server.rank_pids()[3], signal.SIGSTOP)  # the second rank of the second group
                await load.progress(10)
                await asyncio.to_thread(server.wait_for_log, "group 1: ranks lost .the ranks hang")
                await load.progress(10)
                assert await asyncio.to_thread(eventually, lambda: states(server) == ["ready"] * 3)
            assert load.right(reference)

        asyncio.run(scenario())
        assert server.terminate() == 0 and server.leftovers() == []


@pytest.mark.slow
def test_a_rank_that_cannot_be_killed_ends_the_server(checkpoint, tmp_path, picture):
    """As with a driver that hangs. The kernel still ends this one, with the front."""
    environment = {"PYTHONPATH": FAULTS, "FAULT_UNKILLABLE": "1"}
    with start(checkpoint, tmp_path / "s", "--stall-s", "2", environment=environment) as server:
        server.healthy()
        os.kill(server.rank_pids()[0], signal.SIGSTOP)
        assert server.process.wait(90) == 1
        assert "cannot be killed" in server.log.splitlines()[-1]
        assert eventually(lambda: server.leftovers() == [])
