"""A live server writes embeddings into another process's memory, by a real Mooncake over TCP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from encode_server.media import samples as demo_media
from tests.live import LiveServer, eventually
from tests.server.prefill_standin import PrefillRank
from tests.server.test_sglang import TOLERANCE, body, data_uri, png, post

pytestmark = [pytest.mark.slow]  # a server of its own; tests/delivery/test_landings.py is the short version
engine = pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")

ROOM = 1 << 22
OPTIONS = ("--protocol", "sglang", "--mooncake-host", "127.0.0.1", "--mooncake-pool-mb", "8", "--send-timeout-s", "20")


@pytest.fixture(scope="module")
def live(checkpoint, tmp_path_factory):
    with LiveServer(checkpoint, tmp_path_factory.mktemp("mooncake"), *OPTIONS) as server:
        yield server.healthy()


class Rank(PrefillRank):
    """With memory for embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self._engine = engine.TransferEngine()
        assert self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
        self.room = np.zeros(ROOM, np.uint8)
        assert self._engine.register_memory(self.room.ctypes.data, ROOM) == 0
        self.session = f"127.0.0.1:{self._engine.get_rpc_port()}"

    def size(self, live, req_id: str) -> httpx.Response:
        return post(live, "/scheduler_receive_meta_data", {"req_id": req_id, "part_idx": 0})

    def send(self, live, size: dict, count: int = 1, **fields) -> httpx.Response:
        where = {
            "prefill_host": "127.0.0.1",
            "embedding_port": self.port,
            "session_id": self.session,
            "buffer_address": self.room.ctypes.data,
            "receive_count": count,
        }
        return post(live, "/send", size | where | fields)


def nothing_is_held(live) -> bool:
    names = ["encode_requests_in_progress", "encode_registrations", "encode_undelivered_bytes", "encode_inflight_bytes"]
    names += ["encode_mooncake_pool_bytes", 'encode_pool_full_total{pool="mooncake"}']
    return eventually(lambda: all(live.metric(name) == 0 for name in names), 30)


def test_two_ranks_get_the_embedding_in_their_memory(live, reference):
    picture = png(5, 112)
    expected = reference.image(picture)
    with Rank() as first, Rank() as second, ThreadPoolExecutor(4) as pool:
        early = pool.submit(first.size, live, "two")  # before the part is there
        encode = pool.submit(post, live, "/encode", body("two", data_uri(picture)))
        size = early.result().json()
        assert (size["embedding_len"], size["embedding_dim"]) == expected.shape
        assert size["embedding_size"] == expected.nbytes
        sends = [pool.submit(rank.send, live, size, 2) for rank in (first, second)]
        assert [each.result().json() for each in (*sends, encode)] == [None] * 3
        for rank in (first, second):
            header = rank.receive()
            assert header.embedding is None and tuple(header.shape) == expected.shape
            rows = rank.room[: expected.nbytes].view(np.float32).reshape(expected.shape)
            assert np.abs(rows - expected).max() <= TOLERANCE
    assert nothing_is_held(live)


def test_a_part_that_fails_is_told_to_who_asks_for_its_size(live):
    with Rank() as rank, ThreadPoolExecutor(2) as pool:
        early = pool.submit(rank.size, live, "bad")
        assert post(live, "/encode", body("bad", data_uri(b"no image"))).status_code == 400
        assert early.result().status_code == rank.size(live, "bad").status_code == 400
    assert nothing_is_held(live)


def test_a_rank_that_is_gone_when_its_memory_is_written_to(live):
    with Rank() as rank, ThreadPoolExecutor(2) as pool:
        encode = pool.submit(post, live, "/encode", body("gone", data_uri(demo_media.picture())))
        size = rank.size(live, "gone").json()
        assert rank.send(live, size, session_id="127.0.0.1:1").status_code == 502
        assert encode.result().status_code == 502
        assert rank.nothing_came()
    assert nothing_is_held(live)


def test_the_server_ends_while_a_prefill_has_not_said_where(checkpoint, tmp_path):
    options = (*OPTIONS, "--cache-gb", "0", "--grace-s", "0.5")
    with LiveServer(checkpoint, tmp_path, *options) as server, Rank() as rank, ThreadPoolExecutor(1) as pool:
        server.healthy()
        encode = pool.submit(post, server, "/encode", body("slow", data_uri(png(5, 112))))
        nbytes = rank.size(server, "slow").json()["embedding_size"]
        assert eventually(lambda: server.metric("encode_mooncake_pool_bytes") >= nbytes, 30)  # copied straight there
        assert server.terminate() == 0
        assert encode.result().status_code >= 500
        assert not server.leftovers()
