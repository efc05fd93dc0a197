"""The connector that vLLM loads, in the hands of a stand-in for vLLM."""

from __future__ import annotations

import importlib
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zmq

from encode_server.wire.frames import EmbeddingHeader, ErrorInfo, encode_header
from encode_server.wire.modality import Modality
from tests.fleet import vllm_standin
from tests.fleet.vllm_standin import Engine, Request
from tests.live import eventually


@pytest.fixture
def connector(monkeypatch):
    vllm_standin.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "encode_server.vllm.connector", raising=False)
    yield importlib.import_module("encode_server.vllm.connector")
    del sys.modules["encode_server.vllm.connector"]


@pytest.fixture
def start(connector, context):
    """`start(workers=…, **options)` is an engine with the connector, and a way to push to it."""
    engines = []

    def start(**options) -> tuple[Engine, Pusher]:
        engine = Engine(connector.EncodeServerConnector, **options)
        engines.append(engine)
        return engine, Pusher(engine, context)

    yield start
    for engine in engines:
        engine.scheduler.shutdown()


class Pusher:
    def __init__(self, engine: Engine, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._inbox = engine.scheduler._inbox
        self._socket = context.socket(zmq.PUSH)
        self._socket.connect(self._inbox.endpoint)

    def raw(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)

    def push(self, name: str, rows: int, dim: int = 4, *, fill: float = 1.0, wait: bool = True) -> np.ndarray:
        values = np.full((rows, dim), fill, np.float32)
        values[:, 0] = range(rows)
        header = EmbeddingHeader(name, "m", Modality.IMAGE, dtype="float32", shape=(rows, dim))
        handled = self._inbox.received + self._inbox.refused
        self.raw(encode_header(header), values.tobytes())
        if wait:
            assert eventually(lambda: self._inbox.received + self._inbox.refused > handled)
        return values


def test_pushed_embeddings_are_loaded_by_every_worker_and_the_rest_is_encoded(start):
    engine, pusher = start(workers=2, dtype=torch.bfloat16)
    values = pusher.push("es-a", 6)
    assert engine.step(Request("r", ["es-a", "own"], [6, 9])) == ["own"]
    for cache in engine.caches:
        assert set(cache) == {"es-a"} and cache["es-a"].dtype is torch.bfloat16
        assert np.array_equal(cache["es-a"].float().numpy(), values)
    assert engine.scheduler.take_unavailable_requests() == set()


def test_a_pushed_item_is_waited_for_and_then_encoded(start):
    engine, pusher = start(wait_s=0.3)
    request = Request("r", ["es-late"], [3])
    assert engine.step(request) is None, "put off"
    pusher.push("es-late", 3)
    assert engine.step(request) == []
    never = Request("r2", ["es-never"], [3])
    assert engine.step(never) is None
    assert eventually(lambda: engine.step(never) == ["es-never"])
    assert engine.step(Request("r3", ["somebody-else's-name"], [3])) == ["somebody-else's-name"]


def test_an_embedding_of_other_rows_is_not_used(start):
    """vLLM would take it for a place of another size."""
    engine, pusher = start(wait_s=0)
    pusher.push("es-a", 5)
    assert engine.step(Request("r", ["es-a"], [6])) == ["es-a"]


def test_memory_is_bounded_and_what_was_promised_stays(start):
    engine, pusher = start(max_bytes=3 * 128, lease_s=60, wait_s=0)
    for name in ("es-1", "es-2", "es-3", "es-4"):
        pusher.push(name, 6)
    assert engine.scheduler._inbox.refused == 1 and engine.scheduler._shelf.bytes == 3 * 6 * 16
    assert engine.step(Request("r", ["es-1", "es-4"], [6, 6])) == ["es-4"]
    engine, pusher = start(max_bytes=3 * 128, lease_s=0, wait_s=0)
    for name in ("es-1", "es-2", "es-3"):
        pusher.push(name, 6)
    assert engine.scheduler.has_cache_item("es-1")  # used last
    pusher.push("es-4", 6)
    assert engine.step(Request("r", ["es-1", "es-2", "es-3", "es-4"], [6] * 4)) == ["es-2"]


def test_a_load_that_fails_fails_its_requests_and_not_the_engine(start, connector, monkeypatch):
    engine, pusher = start()
    pusher.push("es-a", 6)

    def fail(*_: object) -> None:
        raise OSError("the memory is gone")

    monkeypatch.setattr(connector, "read", fail)
    assert engine.step(Request("r", ["es-a"], [6])) == []
    assert engine.caches[0]["es-a"].shape == (6, 4), "a place of the right size"
    assert engine.scheduler.take_unavailable_requests() == {"r"}
    assert engine.scheduler.take_unavailable_requests() == set()


def test_zeros_in_the_engines_cache_answer_nobody(start, connector, monkeypatch):
    """vLLM keeps what stood in for a failed load in its cache and asks the connector no more for that item."""
    engine, pusher = start(wait_s=0)
    values = pusher.push("es-a", 6)

    def fail(*_: object) -> None:
        raise OSError("the memory is gone")

    with monkeypatch.context() as broken:
        broken.setattr(connector, "read", fail)
        assert engine.step(Request("first", ["es-a"], [6])) == []
    assert engine.scheduler.take_unavailable_requests() == {"first"}
    assert engine.step(Request("second", ["es-a"], [6])) == [], "loaded again, because the embedding is still there"
    assert np.array_equal(engine.caches[0]["es-a"].numpy(), values)

    pusher.push("es-b", 6)
    with monkeypatch.context() as broken:
        broken.setattr(connector, "read", fail)
        assert engine.step(Request("third", ["es-b"], [6])) == []
    engine.scheduler.take_unavailable_requests()
    engine.scheduler._shelf.drop("es-b")
    assert engine.step(Request("fourth", ["es-b"], [6])) is None
    assert engine.scheduler.take_unavailable_requests() == {"fourth"}
    for cache in engine.caches:
        del cache["es-b"]
    engine.freed = ["es-b"]
    assert engine.step(Request("fifth", [], [])) == []
    assert engine.step(Request("sixth", ["es-b"], [6])) == ["es-b"], "encoded by the engine once its cache is clean"


def test_requests_that_share_an_item_fail_together_when_it_cannot_be_loaded(start, connector):
    engine, pusher = start()
    pusher.push("es-a", 6)
    first, second = Request("first", ["es-a"], [6]), Request("second", ["es-a"], [6])
    assert engine.step(first) == [] and engine.step(second) == []
    missing = SimpleNamespace(ec_connector_worker_meta=connector.Missing({"es-a"}))
    engine.scheduler.update_connector_output(missing)  # vLLM's steps overlap: the word comes late
    assert engine.scheduler.take_unavailable_requests() == {"first", "second"}


def test_items_on_their_way_are_waited_for_together(start):
    engine, _ = start(wait_s=0.2)
    request = Request("r", [f"es-{number}" for number in range(20)], [3] * 20)
    assert engine.step(request) is None
    time.sleep(0.3)
    assert engine.step(request) == request.identifiers, "every item's wait began with the first step"


def test_what_strangers_send_is_dropped(start):
    engine, pusher = start(wait_s=0)
    error = ErrorInfo(400, "bad_media", "no")
    for frames in (
        [b"nonsense"],
        [b"\x80\x03}q\x00.", b"pickle"],
        [encode_header(EmbeddingHeader("es-a", "m", Modality.IMAGE, dtype="float32", shape=(6, 4))), b"short"],
        [encode_header(EmbeddingHeader("es-a", "m", Modality.IMAGE, num_parts=2, dtype="float32", shape=(0, 4))), b""],
        [encode_header(EmbeddingHeader("es-a", "m", Modality.IMAGE, error=error))],
    ):
        pusher.raw(*frames)
    pusher.push("../../es-b", 2)
    assert engine.scheduler._inbox.malformed == 4
    assert engine.step(Request("r", ["es-a", "../../es-b"], [6, 2])) == ["es-a"]


def test_nothing_it_meets_raises_into_the_engine(start):
    engine, _ = start(wait_s=0)
    strange = Request("r", ["es-a"], [6])
    strange.mm_features = [object()]
    assert engine.scheduler.ensure_cache_available(strange, 0) is True
    assert engine.scheduler.has_cache_item(None) is False
    engine.scheduler.update_state_after_alloc(strange, 7)
    assert engine.scheduler.request_finished(strange) == (False, None)
    engine.workers[0].bind_connector_metadata(None)
    engine.workers[0].start_load_caches({})


@contextmanager
def producing():
    given = vllm_standin.config()
    given.ec_transfer_config.is_ec_producer = True
    yield given


def test_what_cannot_work_is_said_at_start(connector, start):
    engine, _ = start()
    with pytest.raises(zmq.ZMQError):
        Engine(connector.EncodeServerConnector, bind=engine.scheduler._inbox.endpoint)
    with producing() as given, pytest.raises(ValueError, match="ec_consumer"):
        connector.EncodeServerConnector(given, vllm_standin.ECConnectorRole.WORKER)


METADATA = ("image_grid_thw",)


def test_a_request_without_media_fails_when_its_embedding_does_not_come(start):
    """vLLM itself would end: there is nothing to encode."""
    engine, pusher = start(wait_s=0.2)
    request = Request("r", ["es-p-a"], [6], METADATA)
    assert engine.step(request) is None and engine.scheduler.take_unavailable_requests() == set()
    pusher.push("es-p-a", 6)
    assert engine.step(request) == []
    for name, rows in (("es-p-never", 6), ("somebody's-own-name", 6), ("es-p-a", 7)):
        request = Request(name, [name], [rows], METADATA)
        assert eventually(lambda request=request: engine.step(request) is None and request.request_id in failed(engine))
    assert engine.step(Request("r2", ["es-p-b"], [6])) is None
    assert eventually(lambda: engine.step(Request("r2", ["es-p-b"], [6])) == ["es-p-b"]), "its media came along"


def failed(engine: Engine) -> set[str]:
    return engine.scheduler.take_unavailable_requests()


def test_an_embedding_that_nothing_can_replace_stays_until_its_request_has_ended(start):
    engine, pusher = start(max_bytes=2 * 128, lease_s=0, wait_s=0)
    pusher.push("es-p-1", 6)
    request = Request("r", ["es-p-1"], [6], METADATA)
    assert engine.step(request) == []
    for name in ("es-2", "es-3", "es-4"):
        pusher.push(name, 6)
    assert engine.scheduler.has_cache_item("es-p-1"), "the engine may put the request off, and load again later"
    engine.scheduler.request_finished(request)
    for name in ("es-5", "es-6"):
        pusher.push(name, 6)
    assert not engine.scheduler.has_cache_item("es-p-1")


def test_what_has_been_computed_is_not_asked_for_again(start):
    engine, pusher = start(max_bytes=128, lease_s=0, wait_s=60)
    pusher.push("es-1", 6)
    request = Request("r", ["es-1"], [6])
    assert engine.step(request) == []
    pusher.push("es-2", 6)  # takes the place of es-1
    assert engine.step(request) is None, "it would be awaited"
    engine.caches = [{"es-1": None}]
    assert engine.step(request, computed=6) == []
