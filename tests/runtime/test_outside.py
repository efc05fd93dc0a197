"""Who ended a process, and who stopped it, as far as that can be known."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from encode_server.runtime.outside import OomKills, stopped_from_outside


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/pod/server\n", "sys/fs/cgroup/pod/server/memory.events"),
        ("4:memory:/pod\n0::/\n", "sys/fs/cgroup/memory/pod/memory.oom_control"),
        ("0::/elsewhere\n", "proc/vmstat"),
        ("", "proc/vmstat"),
    ],
)
def test_what_the_kernel_killed_is_counted_where_the_kernel_counts_it(tmp_path: Path, groups: str, file: str) -> None:
    write(tmp_path / "proc/self/cgroup", groups)
    assert OomKills(tmp_path).count() is None
    write(tmp_path / "proc/vmstat", "oom_kill 90\n")
    write(tmp_path / file, "oom 1\noom_kill 7\noom_group_kill 0\n")
    assert OomKills(tmp_path).count() == 7


def test_a_process_that_somebody_stopped_is_told_from_one_that_sleeps() -> None:
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert not stopped_from_outside(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        end = time.monotonic() + 10
        while not stopped_from_outside(process.pid):
            assert time.monotonic() < end
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()
    assert not stopped_from_outside(process.pid)
