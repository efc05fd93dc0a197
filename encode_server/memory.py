"""The memory that a server may come to need, from its options, and what the machine has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from encode_server.bounds import bounds, table
from encode_server.pipeline.shared.cache import QUEUED_BYTES
from encode_server.pipeline.shared.mooncake import LOCAL_BYTES, MooncakeAddress
from encode_server.runtime.cgroups import MOUNT, PROC, granted
from encode_server.runtime.connections import ConnectionLimits
from encode_server.service.options import preparer_processes, shared_address, uses_mooncake
from encode_server.settings import Settings

MIB = 1 << 20
FRONT_BYTES = 200 * MIB  # the process without a request
LOADED_BYTES = 200 * MIB  # of a preparer's own, beside what it shares with the forkserver
SHARED_BYTES = 600 * MIB  # torch and the decoders, once
CONNECTION_BYTES = 256 << 10  # buffers for reading and writing, beside the head
WORK_THREADS = 4  # each may have a body or an item twice, in two forms


@dataclass(frozen=True)
class Need:
    """What some part of the server may take, in bytes."""

    what: str
    nbytes: int


def worst_case(settings: Settings) -> list[Need]:
    """The parts of the server's memory at their bounds, all of them reached together. The ranks' weights and workspace
    are not among them: they depend on the checkpoint, not on what strangers send. Raises StartupError for a
    --shared-cache that is no address."""
    s = settings
    processes = s.preproc_processes or preparer_processes(s.preproc_workers)
    head = ConnectionLimits().head_bytes
    twice = WORK_THREADS * (s.max_body_mb + s.max_media_mb) + s.preproc_workers * s.max_media_mb
    needs = [
        Need("the front, the forkserver", FRONT_BYTES + SHARED_BYTES),
        Need("connections", s.max_connections * (CONNECTION_BYTES + head)),
        # Base64 stays beside what was decoded from it, which is charged; a body may go beyond the bound once.
        Need("requests in progress", (s.max_inflight_mb + s.max_body_mb) * MIB),
        Need("bodies and items being decoded, joined, handed over", twice * MIB),
        Need("embeddings on their way", s.undelivered_mb * MIB),
        Need("the cache", int(s.cache_gb * (1 << 30))),
        Need("the arena", s.arena_mb * MIB),
        Need(f"{processes} preparers", processes * (s.preproc_memory_mb * MIB + LOADED_BYTES)),
    ]
    if s.nixl_pool_mb:
        needs.append(Need("memory registered with NIXL", s.nixl_pool_mb * MIB))
    if uses_mooncake(s):
        needs.append(Need("memory registered with Mooncake", s.mooncake_pool_mb * MIB))
    if (shared := shared_address(s)) is not None:
        needs.append(Need("embeddings that wait for the shared cache", QUEUED_BYTES))
        if isinstance(shared, MooncakeAddress):
            needs.append(Need("Mooncake's buffer, and what is lent to the store", LOCAL_BYTES + shared.segment_bytes))
    return needs


def available(proc: Path = PROC, mount: Path = MOUNT) -> int:
    """The memory of this machine, or of the control group of this process where that has less, in bytes. `proc`,
    `mount`: where the kernel tells of control groups."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def version2(group: Path) -> int:
        return int((group / "memory.max").read_text())  # `max` is no number, and no limit

    def version1(group: Path) -> int:
        return int((group / "memory.limit_in_bytes").read_text())

    return min([machine, *granted("memory", version2, version1, proc, mount)])


def warning(settings: Settings) -> str | None:
    """What to tell the operator when the worst case is more than there is; None when it is not."""
    need, have = sum(part.nbytes for part in worst_case(settings)), available()
    if need <= have:
        return None
    return (
        f"at their bounds, requests may take {need / (1 << 30):.1f} GiB beside the ranks, and this machine or its "
        f"control group has {have / (1 << 30):.1f} GiB: see `encode-server serve --explain-limits`"
    )


def explain(settings: Settings) -> str:
    """All bounds, the worst case and what there is, for the operator."""
    parts = worst_case(settings)
    lines = [table(bounds(settings)), "", "Memory at the bounds, beside the ranks:", ""]
    lines += [f"  {part.nbytes / (1 << 30):8.2f} GiB  {part.what}" for part in parts]
    lines += [f"  {sum(part.nbytes for part in parts) / (1 << 30):8.2f} GiB  in all"]
    lines += [f"  {available() / (1 << 30):8.2f} GiB  this machine or its control group has", ""]
    return "\n".join([*lines, warning(settings) or "There is enough."])
