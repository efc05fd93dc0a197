"""What a preparer gives up before it reads a stranger's bytes.

The decoders are C code on hostile input. Here that code can neither write files, nor leave a core dump, nor take more
memory than its bound, nor fill the server's log. Not confined: which files the process may read, and the network; that
takes a container's seccomp profile or a network policy (see docs/security.md).
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

NICE = 2  # the front must run immediately when it has to; the ranks on a CPU run at nice 5 and are fed from here
PR_SET_NO_NEW_PRIVS = 38
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
KEPT_FREE = 64 << 20  # bytes of freed memory that a preparer keeps for the next item
MAPPED_ALONE = 32 << 20  # bytes from which a block is the kernel's again as soon as it is free; glibc's largest value


def confine(memory_bytes: int) -> None:
    """Apply the limits. Call this function once everything is loaded: `memory_bytes` counts from what is mapped now."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mallopt(M_TRIM_THRESHOLD, KEPT_FREE)
    libc.mallopt(M_MMAP_THRESHOLD, MAPPED_ALONE)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    _lower(resource.RLIMIT_AS, _mapped() + memory_bytes)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_CORE, 0)
    os.nice(NICE)
    # libtiff alone writes 65,000 lines about a file of 20 KB.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _lower(limit: int, value: int) -> None:
    _, hard = resource.getrlimit(limit)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(limit, (value, value))


def _mapped() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
