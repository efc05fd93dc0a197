"""/health encodes, tells the truth when the ranks are stuck, and answers in time when they are busy."""

import asyncio
import os
import signal
import statistics
import time

import httpx
import pytest

from encode_server.client import EncodeClient, EncodeServerError
from tests.live import LiveServer, eventually


def until_healthy(server) -> None:
    """A machine that stalled for a second and a half is rightly called unhealthy, once."""
    assert eventually(lambda: httpx.get(server.base_url + "/health", timeout=60).status_code == 200)


def test_health_encodes_each_modality_on_every_rank(tp2):
    until_healthy(tp2)
    for path in ("/health", "/health_generate"):
        answer = httpx.get(tp2.base_url + path, timeout=60)
        document = answer.json()
        assert answer.status_code == 200 and document["status"] == "healthy"
        assert {m for m, state in document["modalities"].items() if state["ok"]} == {"image", "video", "audio"}
        assert document["ranks"] == {"0": "ready", "1": "ready"}
        assert time.time() - document["last_success"] < 10


def test_simultaneous_probes_share_one_encode(server):
    def forwards() -> float:
        lines = httpx.get(server.base_url + "/metrics", timeout=60).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("encode_batch_tokens_count"))

    until_healthy(server)
    before = forwards()

    async def probe():
        async with httpx.AsyncClient(timeout=60) as client:
            answers = await asyncio.gather(*(client.get(server.base_url + "/health") for _ in range(20)))
            assert all(answer.status_code == 200 for answer in answers)

    asyncio.run(probe())
    assert 3 <= forwards() - before <= 30  # 20 probes of three modalities each would be 60


def test_busy_server_answers_its_probe_in_time(server, picture):
    """Batches of seconds in flight; the probe is judged by progress and stays fast."""

    pictures = [picture(1400, 1400, i) for i in range(6)]
    until_healthy(server)

    async def load_and_probe():
        async with EncodeClient(server.base_url) as client, httpx.AsyncClient(timeout=60) as prober:
            load = [asyncio.create_task(client.encode([one], "image")) for one in pictures]
            while "encode_batches_in_flight 0.0" in (await prober.get(server.base_url + "/metrics")).text:
                assert not all(task.done() for task in load)
            times, busy = [], 0
            while not all(task.done() for task in load):
                started = time.perf_counter()
                answer = await prober.get(server.base_url + "/health")
                times.append(time.perf_counter() - started)
                assert answer.status_code == 200, answer.text
                busy += answer.json()["reason"] == "encoding"
                await asyncio.sleep(0.02)
            await asyncio.gather(*load)
            return times, busy

    times, busy = asyncio.run(load_and_probe())
    # The kubelet's patience. The median: a neighbour may take the processors away for a while.
    assert busy > 0 and statistics.median(times) < 2.0


def test_stopped_rank_is_noticed_and_the_server_recovers(checkpoint, tmp_path):
    """SIGSTOP: the process is there and does nothing. Idle: the probe's encode does not end, and is no lie."""
    with LiveServer(checkpoint, tmp_path / "s", "--stall-s", "4") as server:
        server.healthy()
        (rank,) = server.rank_pids()
        os.kill(rank, signal.SIGSTOP)
        assert eventually(lambda: httpx.get(server.base_url + "/health", timeout=10).status_code == 503)
        assert eventually(lambda: rank not in server.rank_pids(), 15)  # given up as hung, and replaced
        server.healthy()


def test_loading_server_says_so(checkpoint, tmp_path):
    with LiveServer(checkpoint, tmp_path / "s") as server:
        server.listening()
        server.wait_for_log("rank 0")
        (rank,) = server.rank_pids()
        os.kill(rank, signal.SIGSTOP)  # so that it is still loading when it is asked
        answer = httpx.get(server.base_url + "/health", timeout=60)
        assert answer.status_code == 503 and answer.json()["status"] == "unhealthy"
        assert httpx.get(server.base_url + "/readyz", timeout=60).status_code == 503
        assert httpx.get(server.base_url + "/livez", timeout=60).status_code == 200

        async def early():
            async with EncodeClient(server.base_url) as client:
                with pytest.raises(EncodeServerError) as error:
                    await client.encode([b"x"], "image")
                return error.value

        assert asyncio.run(early()).status == 503
        os.kill(rank, signal.SIGCONT)
        server.healthy()
        assert httpx.get(server.base_url + "/readyz", timeout=60).status_code == 200
