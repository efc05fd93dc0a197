"""Two servers and a real Redis: what one has encoded, the other answers without encoding."""

from __future__ import annotations

import asyncio
import re
import shutil
from functools import partial

import httpx
import pytest

from benchmarks.redis_server import RedisServer
from encode_server.client import EncodeClient
from encode_server.media import samples
from tests.live import LiveServer, eventually
from tests.redis_server import needs_redis

pytestmark = [needs_redis, pytest.mark.slow]  # two servers; tests/pipeline/test_shared_cache.py is the short version

MEDIA = {"image": samples.picture(), "video": samples.clip(), "audio": samples.sound()}


def figure(server: LiveServer, name: str) -> float:
    """A counter of /metrics, summed over its series whose line holds all of `name`'s words."""
    metric, *labels = name.split()
    lines = (line for line in httpx.get(server.base_url + "/metrics").text.splitlines() if line.startswith(metric))
    wanted = (line for line in lines if re.split(r"[{ ]", line)[0] == metric and all(label in line for label in labels))
    return sum(float(line.rpartition(" ")[2]) for line in wanted)


def has_stored(server: LiveServer, items: int) -> bool:
    return figure(server, "encode_shared_cache_writes_total stored") == items


def encode(server: LiveServer, modality: str):
    async def ask():
        async with EncodeClient(server.base_url) as client:
            return await client.encode([MEDIA[modality]], modality)

    return asyncio.run(ask())


@pytest.fixture(scope="module")
def redis():
    with RedisServer("--requirepass", "h1dden") as server:
        yield server


@pytest.fixture(scope="module")
def replicas(redis, checkpoint, tmp_path_factory):
    """Two servers of the same checkpoint, which lies in two places."""
    where = tmp_path_factory.mktemp("replicas")
    other = shutil.copytree(checkpoint, where / "copy")
    variables = {"ENCODE_SERVER_SHARED_CACHE": redis.url.replace("//", "//:h1dden@")}
    with (
        LiveServer(checkpoint, where / "a", environment=variables) as first,
        LiveServer(other, where / "b", environment=variables) as second,
    ):
        for server in (first, second):
            server.healthy()
            server.wait_for_log("the shared cache is used")
        yield first, second


def test_the_second_server_answers_without_encoding(replicas):
    first, second = replicas
    for number, modality in enumerate(MEDIA, 1):
        ours = encode(first, modality)
        assert eventually(partial(has_stored, first, number))
        theirs = encode(second, modality)
        assert bytes(ours.data) == bytes(theirs.data)
        assert (theirs.shape, theirs.dtype, theirs.items[0].tokens) == (ours.shape, ours.dtype, ours.items[0].tokens)
        assert theirs.items[0].grid_thw == ours.items[0].grid_thw
        assert theirs.items[0].metadata == ours.items[0].metadata
        assert not ours.items[0].cached and theirs.items[0].cached
    assert figure(first, "encode_shared_cache_queued_bytes") == 0
    assert figure(second, "encode_preprocessed_items_total") == 0
    assert figure(second, "encode_shared_cache_lookups_total hit") == 3
    assert figure(second, "encode_inflight_bytes") == 0  # and it owes nothing
    encode(second, "image")  # the second time from its own memory
    assert figure(second, "encode_shared_cache_lookups_total hit") == 3


def test_the_password_is_shown_nowhere(replicas):
    for server in replicas:
        shown = httpx.get(server.base_url + "/server_info").text
        assert re.search(r'"shared_cache":"redis://127\.0\.0\.1:\d+"', shown)
        assert "h1dden" not in shown + server.log


def test_without_redis_everything_goes_on(replicas, redis):
    """Redis comes back at the end, for the other tests."""
    redis.kill()
    first, _ = replicas
    for seed in range(6):
        answer = httpx.post(
            first.base_url + "/encode", files={"file": samples.noise(56, 56, seed)}, data={"modality": "image"}
        )
        assert answer.status_code == 200
    assert eventually(lambda: figure(first, "encode_shared_cache_up get") == 0)
    redis.start()
