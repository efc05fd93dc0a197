"""A profile ends at its bounds, and its trace is written while the rank goes on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from threading import Event

import pytest

from encode_server.engine import profiler
from encode_server.engine.profile_limits import PART
from encode_server.engine.profiler import Profiler, heap_bytes


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "rank0.json.gz"


def forward(profile: Profiler) -> None:
    import torch

    torch.ones(4, 4) @ torch.ones(4, 4)
    profile.forwarded()


def test_it_ends_after_its_forwards_and_leaves_a_trace(trace: Path) -> None:
    profile = Profiler("cpu")
    profile.start(str(trace), 2)
    forward(profile)
    assert profile.running
    with pytest.raises(ValueError, match="already running"):
        profile.start(str(trace), 2)
    forward(profile)
    assert not profile.running
    profile.close()
    names = {event.get("name") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "aten::mm" in names
    assert list(trace.parent.iterdir()) == [trace]
    with pytest.raises(ValueError, match="no profile is running"):
        profile.stop()


def test_it_ends_when_its_time_is_up_although_nothing_is_forwarded(
    trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "MAX_SECONDS", -1.0)
    profile = Profiler("cpu")
    profile.start(str(trace), None)
    profile.look()
    assert not profile.running
    profile.close()
    assert trace.exists()


def test_it_ends_when_its_events_take_too_much_memory(trace: Path) -> None:
    used = [900 << 20, 100 << 20, 131 << 20, 133 << 20]  # the first while another thread was executing a forward
    profile = Profiler("cpu", lambda: used.pop(0))
    profile.start(str(trace), None)
    forward(profile)
    forward(profile)
    assert profile.running
    forward(profile)
    assert not profile.running
    profile.close()


def test_the_heap_is_seen_to_grow() -> None:
    before = heap_bytes()
    held = bytes(50 << 20)
    assert heap_bytes() - before >= len(held)


def test_the_rank_goes_on_while_the_trace_is_written(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on = Event()
    write = profiler._write

    def slowly(*arguments: object) -> None:
        assert goes_on.wait(20)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(profiler, "_write", slowly)
    profile = Profiler("cpu")
    profile.start(str(trace), 1)
    forward(profile)
    assert not profile.running and not trace.exists() and Path(f"{trace}{PART}").exists()
    with pytest.raises(ValueError, match="still being written"):
        profile.start(str(trace), 1)
    goes_on.set()
    profile.close()
    assert trace.exists() and not Path(f"{trace}{PART}").exists()


def test_a_trace_that_cannot_be_written_leaves_nothing(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(profiler.shutil, "copyfileobj", full)
    profile = Profiler("cpu")
    profile.start(str(trace), 1)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    forward(profile)
    profile.close()
    assert list(trace.parent.iterdir()) == []


def test_a_directory_that_is_gone_is_told_before_anything_is_recorded(tmp_path: Path) -> None:
    profile = Profiler("cpu")
    with pytest.raises(OSError):
        profile.start(str(tmp_path / "gone" / "rank0.json.gz"), 1)
    assert not profile.running
