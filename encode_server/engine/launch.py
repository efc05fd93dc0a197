"""Start rank processes: fresh interpreters that inherit the arena and the rendezvous store, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def spawn_rank(socket: Path, rank: int, *, fds: tuple[int, ...], threads: int) -> subprocess.Popen[bytes]:
    """Start rank `rank`, which will connect to the ipc `socket`.

    Call it from the main thread: the kernel's parent-death signal follows the thread that spawned the process. A group
    of its own keeps the terminal's Ctrl-C from it.
    """
    arguments = ["--socket", str(socket), "--rank", str(rank), "--parent", str(os.getpid())]
    return subprocess.Popen(
        [sys.executable, "-m", "encode_server.engine.rank", *arguments],
        stdin=subprocess.DEVNULL,
        pass_fds=fds,
        process_group=0,
        env=rank_environment(threads),
    )


def rank_environment(threads: int) -> dict[str, str]:
    """The environment of a rank with so many threads: ours, and what libraries read when they are loaded.

    What the user has set is left alone, but for the number of threads.
    """
    return {
        # Threads that spin long at OpenMP's barriers take the cores from the front, and from each other's work: with
        # other load beside it a forward then costs ten times its processor time. Some 0.1 ms of spinning spares a
        # forward that is alone most of its sleeps, which cost it a quarter of its time.
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "10000",
        # oneDNN keeps half a megabyte of code for each number of rows it ever multiplied, 1024 of them by default,
        # and torch's wrapper of it as many again.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "LRU_CACHE_CAPACITY": "128",
        # glibc gives large blocks back to the kernel as soon as they are free, and the next layer pays for every page
        # of its own again: 40,000 page faults for a picture of 448², a tenth of its forward. Here memory once needed
        # is kept, in huge pages.
        "GLIBC_TUNABLES": (
            "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=4294967296:glibc.malloc.hugetlb=1"
        ),
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
