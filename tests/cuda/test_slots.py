"""Slots are given back when Done is said. Mutants of the rank show that these tests would notice a Done too early."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.card.device import Event, emulated
from benchmarks.card.ledger import Kind, Launch
from encode_server.engine.lane import Lane
from encode_server.wire import ranks as m
from encode_server.wire.modality import Modality
from tests.checkpoints import Checkpoints
from tests.cuda.ward import Items, Ward, batches, on_a_cpu, relative_error

IMAGE = Modality.IMAGE


@pytest.fixture
def path(checkpoints: Checkpoints) -> Path:
    return checkpoints.path("qwen2_5_vl")


@pytest.fixture
def items(path: Path) -> Items:
    return batches(path)[IMAGE]


@contextmanager
def wait_for_nothing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Event, "synchronize", lambda self: None)
    monkeypatch.setattr(Event, "elapsed_time", lambda self, later: 1.0)
    yield


@contextmanager
def wait_for_the_forward_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The copies out are still queued then."""
    real = Lane.run

    def run(self: Lane, forward: Any, write: Any) -> float:
        def forgotten(embeddings: list[torch.Tensor]) -> None:
            torch.cuda.current_stream().synchronize()  # what comes before the write
            write(embeddings)
            monkeypatch.setattr(Event, "synchronize", lambda self: None)

        return real(self, forward, forgotten)

    monkeypatch.setattr(Lane, "run", run)
    yield


@pytest.mark.parametrize("mutant", [wait_for_nothing, wait_for_the_forward_alone])
def test_a_rank_that_does_not_wait_is_found(
    monkeypatch: pytest.MonkeyPatch, path: Path, items: Items, mutant: Callable[[pytest.MonkeyPatch], Any]
) -> None:
    want = on_a_cpu(path, IMAGE, items)
    with emulated() as device:
        ward = Ward(path)
        command = ward.place(1, IMAGE, items, [len(rows) for rows in want])
        with mutant(monkeypatch):
            ward.worker.forward(command)
        assert device.streams.pending > 0
        assert not relative_error(ward.embeddings(command), want) < 0.5
        ward.release(command)
        device.streams.synchronize()
        assert not ward.is_soiled(command)


def test_a_copy_out_that_does_not_wait_for_the_forward_is_found(
    monkeypatch: pytest.MonkeyPatch, path: Path, items: Items
) -> None:
    monkeypatch.setattr(Event, "wait", lambda self, stream: None)
    monkeypatch.setattr("benchmarks.card.streams.Stream.wait_event", lambda self, event: None)
    with emulated():
        ward = Ward(path)
        command = ward.place(1, IMAGE, items, [len(rows) for rows in on_a_cpu(path, IMAGE, items)])
        with pytest.raises(AssertionError, match="another stream has not computed"):
            raise AssertionError(getattr(ward.worker.forward(command), "error", ""))


def test_two_batches_of_two_threads_keep_their_own_values(path: Path, items: Items) -> None:
    want = [on_a_cpu(path, IMAGE, [item]) for item in items]
    with emulated() as device:
        ward = Ward(path)
        commands = [
            ward.place(seq, IMAGE, [item], [len(rows) for rows in expected])
            for seq, (item, expected) in enumerate(zip(items, want, strict=True))
        ]
        done: list[m.Done | m.Failed] = []

        def encode(command: m.Forward) -> None:
            with device:  # the mode that intercepts operators belongs to a thread
                done.append(ward.worker.forward(command))
                ward.release(commands[0]) if command is commands[0] else None

        threads = [threading.Thread(target=encode, args=(command,)) for command in commands[1:]]
        for thread in threads:
            thread.start()
        first = ward.worker.forward(commands[0])
        got = ward.embeddings(commands[0])
        ward.release(commands[0])
        for thread in threads:
            thread.join()
        assert not any(getattr(one, "error", "lost") for one in [first, *done])
        assert device.streams.pending == 0
        assert relative_error(got, want[0]) < 0.015
        assert relative_error(ward.embeddings(commands[1]), want[1]) < 0.015
        assert ward.is_soiled(commands[0])


def test_out_of_memory_in_any_layer_leaves_nothing_queued_and_the_next_batch_right(path: Path, items: Items) -> None:
    want = on_a_cpu(path, IMAGE, items)
    with emulated() as device:
        ward = Ward(path)
        tokens = [len(rows) for rows in want]
        command = ward.place(0, IMAGE, items, tokens)
        device.ledger.clear()
        ward.worker.forward(command)
        attention = [n for n, launch in enumerate(device.ledger.launches) if launch.attention]
        last = len(device.ledger.launches) - 1
        for fails_at in (0, *attention, last):
            remaining = fails_at

            def out_of_memory(launch: Launch) -> None:
                nonlocal remaining
                remaining -= 1
                if remaining == -1:
                    raise torch.OutOfMemoryError("CUDA out of memory.")

            device.on_launch = out_of_memory
            done = ward.worker.forward(command)
            device.on_launch = lambda launch: None
            assert isinstance(done, m.Done) and done.out_of_memory, f"at launch {fails_at}"
            assert device.streams.pending == 0
            ward.release(command)
            device.streams.synchronize()
            assert ward.is_soiled(command), f"after running out of memory at launch {fails_at}"
            command = ward.place(fails_at + 1, IMAGE, items, tokens)
        assert not getattr(ward.worker.forward(command), "error", "lost")
        assert relative_error(ward.embeddings(command), want) < 0.015


def test_only_rank_0_writes(path: Path, items: Items) -> None:
    with emulated() as device:
        ward = Ward(path, rank=1)
        command = ward.place(0, IMAGE, items, [len(rows) for rows in on_a_cpu(path, IMAGE, items)])
        ward.release(command)
        device.ledger.clear()
        ward.worker.forward(command)
        assert device.ledger.of(Kind.TO_HOST) == []
