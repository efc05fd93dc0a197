"""What the options of a server stand for in its rooms."""

from __future__ import annotations

from pathlib import Path

import msgspec

from encode_server.delivery.folder import EntryFolder
from encode_server.delivery.mooncake import MooncakeEngine
from encode_server.delivery.nixl import NixlAgent
from encode_server.engine.group import GroupSpec
from encode_server.errors import StartupError
from encode_server.media.limits import MediaLimits
from encode_server.media.policy import UrlPolicy
from encode_server.pipeline.admission import AdmissionLimits
from encode_server.pipeline.shared.line import Store
from encode_server.pipeline.shared.mooncake import MooncakeAddress, MooncakeStore, parse_mooncake
from encode_server.pipeline.shared.redis import RedisAddress, RedisStore, parse_address
from encode_server.prepare.preparers import PreparerSpec
from encode_server.runtime.cores import usable_cores
from encode_server.settings import Settings
from encode_server.telemetry.metrics import Metrics
from encode_server.wire.checkpoint import Inspection
from encode_server.wire.modality import Modality
from encode_server.wire.preparers import PreparerSetup


def group_spec(settings: Settings, found: Inspection) -> GroupSpec:
    """What the ranks of a group are started with."""
    return GroupSpec(
        path=found.path,
        world=settings.tp,
        device=settings.device,
        dtype=settings.dtype,
        checkpoint_dtype=found.dtype,
        threads=settings.rank_threads or max(1, usable_cores() // (settings.tp * settings.dp)),
        facts=found.facts,
        tf32=settings.tf32,
        groups=settings.dp,
        flash_attention=settings.flash_attention,
    )


def batch_tokens(settings: Settings) -> dict[Modality, int]:
    """How many tokens a batch holds at most."""
    return {
        Modality.IMAGE: settings.image_batch_tokens,
        Modality.VIDEO: settings.video_batch_tokens,
        Modality.AUDIO: settings.audio_batch_tokens,
    }


def preparer_spec(settings: Settings, found: Inspection, arena_bytes: int) -> PreparerSpec:
    """What the preparers are started with."""
    processes = settings.preproc_processes or preparer_processes(settings.preproc_workers)
    setup = PreparerSetup(
        socket="",
        path=found.path,
        name=found.name,
        limits=msgspec.Raw(msgspec.msgpack.encode(media_limits(settings))),
        max_item_tokens=settings.max_item_tokens,
        threads=-(-settings.preproc_workers // processes),
        memory_bytes=settings.preproc_memory_mb << 20,
        arena_bytes=arena_bytes,
        device=settings.preproc_device,
    )
    return PreparerSpec(processes, setup.threads, settings.decode_s, setup)


def preparer_processes(workers: int) -> int:
    """How many preparers `--preproc-processes` 0 stands for: one for every two cores, and no more than threads."""
    return max(1, min(workers, usable_cores() // 2))


def check_media_options(settings: Settings) -> None:
    """Raises StartupError for entries of `--media-allow` and `--media-roots` that mean nothing."""
    try:
        UrlPolicy(settings.media_allow)
    except ValueError as error:
        raise StartupError(f"--media-allow: {error}") from None
    for root in settings.media_roots:
        if not Path(root).is_dir():
            raise StartupError(f"--media-roots: {root} is no directory")


def admission_limits(settings: Settings) -> AdmissionLimits:
    """The bounds on requests, from the options."""
    return AdmissionLimits(
        settings.max_requests, settings.max_inflight_mb << 20, settings.max_inflight_tokens, settings.client_share
    )


def shared_address(settings: Settings) -> RedisAddress | MooncakeAddress | None:
    """Where the shared cache is, None where there is none. Raises StartupError."""
    if settings.shared_cache is None:
        return None
    try:
        if settings.shared_cache.startswith("mooncake:"):
            return parse_mooncake(
                settings.shared_cache, settings.mooncake_host, settings.mooncake_protocol, settings.mooncake_device
            )
        return parse_address(settings.shared_cache, settings.shared_cache_password_file)
    except ValueError as error:
        raise StartupError(f"--shared-cache: {error}") from None


def shared_store(settings: Settings, address: RedisAddress | MooncakeAddress) -> Store:
    """What the shared cache is kept in. Raises StartupError without the package for it."""
    if isinstance(address, RedisAddress):
        return RedisStore(address, settings.shared_cache_ttl_s)
    try:
        return MooncakeStore(address)
    except ImportError as error:
        raise StartupError(f"--shared-cache: pip install 'encode-server[mooncake]' ({error})") from None


def uses_mooncake(settings: Settings) -> bool:
    """Whether the options want embeddings to be written into the memory of prefills."""
    return settings.mooncake_host is not None and settings.protocol == "sglang"


def mooncake_engine(settings: Settings, metrics: Metrics) -> MooncakeEngine | None:
    """What writes into the memory of prefills, None where the options want none. Raises StartupError."""
    if settings.mooncake_host is None or not uses_mooncake(settings):
        return None
    return MooncakeEngine(
        settings.mooncake_host,
        settings.mooncake_protocol,
        settings.mooncake_device,
        settings.mooncake_pool_mb << 20,
        metrics.pool_full["mooncake"].inc,
    )


def nixl_agent(settings: Settings, metrics: Metrics) -> NixlAgent | None:
    """What lets destinations read embeddings, None where the options want none. Raises StartupError."""
    if not settings.nixl_pool_mb:
        return None
    return NixlAgent(settings.nixl_pool_mb << 20, metrics.pool_full["nixl"].inc)


def entry_folder(settings: Settings) -> EntryFolder | None:
    """The directory of stored embeddings, None where there is none. Raises StartupError."""
    if settings.ec_store is None:
        return None
    return EntryFolder(
        settings.ec_store, max_bytes=int(settings.ec_store_gb * (1 << 30)), max_age_s=settings.ec_store_age_s
    )


def media_limits(settings: Settings) -> MediaLimits:
    """The limits of one media item, from the options."""
    return MediaLimits(
        max_bytes=settings.max_media_mb << 20,
        max_pixels=settings.max_pixels,
        max_frames=settings.max_frames,
        max_audio_seconds=settings.max_audio_s,
        decode_seconds=settings.decode_s,
        fetch_seconds=settings.fetch_s,
        slow_formats=settings.media_formats == "all",
        white_behind=settings.image_alpha == "white",
    )
