"""`EncodeServerConnector`: vLLM takes embeddings that encode servers push, and encodes by itself what has not come.

    --ec-transfer-config '{"ec_connector": "EncodeServerConnector", "ec_role": "ec_consumer",
      "ec_connector_module_path": "encode_server.vllm.connector",
      "ec_connector_extra_config": {"bind": "tcp://0.0.0.0:30100"}}'

vLLM makes one connector in its scheduler process and one in each worker. The scheduler's receives, into shared memory;
the workers' read from there. Nothing here raises into the engine: an exception would end it.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
    ECConnectorWorkerMetadata,
)

from encode_server.vllm.inbox import Inbox
from encode_server.vllm.shelf import Entry, Shelf, read
from encode_server.wire.names import PLACED_PREFIX, PUSHED_PREFIX

logger = logging.getLogger("vllm.encode_server")  # vLLM shows what is logged below its own name

P = ParamSpec("P")
T = TypeVar("T")

BIND = "tcp://127.0.0.1:30100"
MAX_BYTES = 4 << 30
MAX_ITEM_BYTES = 1 << 30
LEASE_S = 60.0  # how long an entry stays that the scheduler was promised
WAIT_S = 2.0  # for an embedding that was handed over and is still on its way
MAX_AWAITED = 16384
# Fields of an item that size its place in the prompt. An item of these alone cannot be encoded: vLLM would end.
SIZES = frozenset(
    {
        "image_grid_thw",
        "video_grid_thw",
        "timestamps",
        "second_per_grid_ts",
        "audio_num_tokens",
        "audio_feature_lengths",
        "image_sizes",
        "video_image_sizes",
    }
)


class _State(enum.Enum):
    """Of an item that a request needs: it is here or vLLM encodes it, it may still come, or neither."""

    SETTLED = enum.auto()
    AWAITED = enum.auto()
    HOPELESS = enum.auto()


@dataclass
class Loads(ECConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where the type checker runs
    """What the workers load in this step, by identifier. `again`: what the engine's cache holds zeros of."""

    entries: dict[str, Entry] = field(default_factory=dict)
    again: dict[str, Entry] = field(default_factory=dict)


@dataclass
class Missing(ECConnectorWorkerMetadata):  # type: ignore[misc]
    """What a worker could not load, by identifier."""

    identifiers: set[str]

    def aggregate(self, other: ECConnectorWorkerMetadata) -> Missing:
        """What any of two workers could not load."""
        return Missing(self.identifiers | other.identifiers)


class EncodeServerConnector(ECConnectorBase):  # type: ignore[misc]
    """See the module. Options, in `ec_connector_extra_config`: `bind` (tcp://ADDRESS:PORT), `max_bytes` of embeddings,
    `lease_s`, `wait_s`, `nixl` (read embeddings out of servers' memory). Raises zmq.ZMQError when the address cannot be
    had, ValueError for a role other than consumer, ImportError without NIXL: that ends vLLM's start, as it should."""

    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        super().__init__(vllm_config=vllm_config, role=role)
        if self.is_producer:
            raise ValueError("EncodeServerConnector consumes: give ec_role ec_consumer")
        options = vllm_config.ec_transfer_config.get_from_extra_config
        self._dtype: torch.dtype | None = getattr(vllm_config.model_config, "dtype", None)
        self._wait_s = float(options("wait_s", WAIT_S))
        self._shelf: Shelf | None = None
        self._inbox: Inbox | None = None
        self._promised: dict[str, Entry] = {}  # `has_cache_item` said yes in this step
        self._loads = Loads()
        self._readers: dict[str, set[str]] = {}  # requests that use what was loaded, by identifier
        self._zeros: set[str] = set()  # what could not be loaded, while the engine's cache may hold zeros of it
        self._awaited: dict[str, float] = {}  # when an identifier was first asked for in vain
        self._unavailable: set[str] = set()
        self._missing: set[str] = set()
        if role == ECConnectorRole.SCHEDULER:
            self._shelf = Shelf(int(options("max_bytes", MAX_BYTES)), float(options("lease_s", LEASE_S)))
            try:
                nixl = bool(options("nixl", False))
                self._inbox = Inbox(str(options("bind", BIND)), self._shelf, MAX_ITEM_BYTES, nixl=nixl)
            except Exception:
                self._shelf.close()
                raise
            logger.info("embeddings are received at %s", self._inbox.endpoint)

    def shutdown(self) -> None:
        """Receive no more, and give the memory back."""
        if self._inbox is not None:
            self._inbox.close()
        if self._shelf is not None:
            self._shelf.close()

    # The scheduler's side.

    def ensure_cache_available(self, request: Any, num_computed_tokens: int) -> bool:
        """False, for a short time, while an embedding that was pushed for the request is still on its way; then the
        request fails if it holds metadata in place of the media."""
        return _safely(True, self._all_here, request, num_computed_tokens)

    def has_cache_item(self, identifier: str) -> bool:
        """Whether the workers can load this item; then the engine does not encode it."""
        return _safely(False, self._promise, identifier)

    def update_state_after_alloc(self, request: Any, index: int) -> None:
        """The item has its place: the workers load it in this step if it was promised."""
        _safely(None, self._schedule, request, index)

    def build_connector_meta(self, scheduler_output: Any) -> ECConnectorMetadata:
        """What the workers load in this step."""
        self._zeros.difference_update(getattr(scheduler_output, "free_encoder_mm_hashes", ()))
        loads, self._loads = self._loads, Loads()
        self._promised.clear()
        return loads

    def update_connector_output(self, connector_output: Any) -> None:
        """A worker could not load something: the requests that need it fail. Nothing can be encoded any more for a
        step that has run."""
        missing = getattr(connector_output, "ec_connector_worker_meta", None)
        if isinstance(missing, Missing):
            for identifier in missing.identifiers:
                self._zeros.add(identifier)
                self._unavailable |= self._readers.pop(identifier, set())

    def take_unavailable_requests(self) -> set[str]:
        """Requests to fail, each once."""
        taken, self._unavailable = self._unavailable, set()
        return taken

    def request_finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """Nothing of the request is awaited any more."""
        _safely(None, self._forget, request)
        return False, None

    def _all_here(self, request: Any, num_computed_tokens: int) -> bool:
        here = True
        for index, feature in enumerate(request.mm_features):
            if feature.mm_position.offset + feature.mm_position.length <= num_computed_tokens:
                continue  # its tokens have been computed: the embedding is not needed any more
            state = self._look_up(request, index)
            if state is _State.HOPELESS:
                self._unavailable.add(request.request_id)
                return False
            here &= state is _State.SETTLED
        if here and any(feature.identifier in self._zeros for feature in request.mm_features):
            self._unavailable.add(request.request_id)
            return False
        return here

    def _look_up(self, request: Any, index: int) -> _State:
        """Whether an item of the request is on the shelf, or else can be had otherwise."""
        assert self._shelf is not None
        feature = request.mm_features[index]
        name, own = feature.identifier, _can_be_encoded(feature)
        if name in self._readers:
            # vLLM takes the item from its cache and asks no more: a failed load fails this request, too.
            self._readers[name].add(request.request_id)
        entry = self._shelf.get(name)
        if entry is not None and entry.shape[0] != (expected := request.get_num_encoder_embeds(index)):
            logger.error("%s has %d rows, %d are expected: it is not used", name, entry.shape[0], expected)
            self._shelf.drop(name)
        elif entry is not None:
            self._awaited.pop(name, None)
            if not own:
                self._shelf.hold(name, request.request_id)  # vLLM may put the request off, and ask again later
            if name in self._zeros:
                self._zeros.discard(name)
                self._loads.again[name] = entry
                self._readers.setdefault(name, set()).add(request.request_id)
            return _State.SETTLED
        elif name.startswith(PUSHED_PREFIX) and not self._waited(name, time.monotonic()):
            return _State.AWAITED
        if own:
            return _State.SETTLED
        logger.error("%s is not here, and its request holds no media to encode: the request fails", name)
        return _State.HOPELESS

    def _waited(self, name: str, now: float) -> bool:
        """Whether an embedding has been awaited long enough."""
        if len(self._awaited) > MAX_AWAITED:
            self._awaited.clear()
        return now - self._awaited.setdefault(name, now) >= self._wait_s

    def _promise(self, identifier: str) -> bool:
        assert self._shelf is not None
        if (entry := self._shelf.get(identifier)) is None:
            return False
        self._promised[identifier] = entry
        return True

    def _schedule(self, request: Any, index: int) -> None:
        name = request.mm_features[index].identifier
        if (entry := self._promised.get(name)) is not None:
            self._loads.entries[name] = entry
            self._zeros.discard(name)
            self._readers.setdefault(name, set()).add(request.request_id)

    def _forget(self, request: Any) -> None:
        for feature in request.mm_features:
            self._awaited.pop(feature.identifier, None)
            if self._shelf is not None:
                self._shelf.release(feature.identifier, request.request_id)
            if (readers := self._readers.get(feature.identifier)) is not None:
                readers.discard(request.request_id)
                if not readers:
                    del self._readers[feature.identifier]

    # A worker's side.

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Load what the scheduler has promised. An item that cannot be loaded is zeros, and its requests fail."""
        metadata = self._connector_metadata
        if not isinstance(metadata, Loads):
            return
        loads = {name: entry for name, entry in metadata.entries.items() if name not in encoder_cache}
        loads |= {name: entry for name, entry in metadata.again.items() if name in encoder_cache}
        for identifier, entry in loads.items():
            try:
                encoder_cache[identifier] = self._load(entry)
                logger.debug("loaded %s, %d bytes", identifier, entry.nbytes)
            except Exception:
                logger.exception("an embedding cannot be loaded: its requests fail")
                self._missing.add(identifier)
                with contextlib.suppress(Exception):
                    encoder_cache[identifier] = torch.zeros(entry.shape, dtype=self._dtype, device=_device())

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        """What this engine encodes stays here."""

    def build_connector_worker_meta(self) -> ECConnectorWorkerMetadata | None:
        """What could not be loaded in this step."""
        missing, self._missing = self._missing, set()
        return Missing(missing) if missing else None

    def _load(self, entry: Entry) -> torch.Tensor:
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        read(entry, raw.numpy().data)
        stored: torch.dtype = getattr(torch, entry.dtype)
        with _synchronising():
            return raw.view(stored).reshape(entry.shape).to(device=_device(), dtype=self._dtype or stored)


def _can_be_encoded(feature: Any) -> bool:
    """Whether vLLM can encode the item itself. False for an item that consists of metadata."""
    fields = getattr(feature, "data", None)
    if fields is None or not hasattr(fields, "keys"):  # only the workers have the item: the name has to tell
        return not feature.identifier.startswith(PLACED_PREFIX)
    names = set(fields.keys())
    return not names or not names <= SIZES


def _safely(otherwise: T, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The function's result, or `otherwise` when it raises."""
    try:
        return function(*args, **kwargs)
    except Exception:
        logger.exception("the encode server's connector failed: vLLM goes on without it")
        return otherwise


def _device() -> str:
    from vllm.platforms import current_platform

    device = str(current_platform.device_type)
    # A bare "cuda" is the first card, for every worker.
    return f"{device}:{torch.cuda.current_device()}" if device == "cuda" else device


def _synchronising() -> contextlib.AbstractContextManager[None]:
    """vLLM may forbid waiting for the device; a copy from pageable memory does wait."""
    try:
        from vllm.utils.gpu_sync_debug import gpu_sync_allowed
    except ImportError:
        return contextlib.nullcontext()
    return gpu_sync_allowed()  # type: ignore[no-any-return]
