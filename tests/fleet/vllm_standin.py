"""As much of vLLM as the connector sees: the base class and its companions, a configuration, a request."""

from __future__ import annotations

import enum
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

BASE = "vllm.distributed.ec_transfer.ec_connector.base"


class ECConnectorRole(enum.Enum):
    SCHEDULER = 0
    WORKER = 1


class ECConnectorMetadata:
    pass


class ECConnectorWorkerMetadata:
    pass


class ECConnectorBase:
    def __init__(self, vllm_config: Any, role: ECConnectorRole) -> None:
        self._connector_metadata: ECConnectorMetadata | None = None
        self.is_producer = vllm_config.ec_transfer_config.is_ec_producer

    def bind_connector_metadata(self, metadata: ECConnectorMetadata) -> None:
        self._connector_metadata = metadata


def install(monkeypatch) -> None:
    """Make it importable as `vllm`."""
    names = BASE.split(".")
    for depth in range(1, len(names)):
        module = ModuleType(".".join(names[:depth]))
        module.__path__ = []
        monkeypatch.setitem(sys.modules, module.__name__, module)
    base = ModuleType(BASE)
    for item in (ECConnectorRole, ECConnectorMetadata, ECConnectorWorkerMetadata, ECConnectorBase):
        setattr(base, item.__name__, item)
    platforms = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(device_type="cpu")
    monkeypatch.setitem(sys.modules, BASE, base)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)


def config(dtype: torch.dtype = torch.float32, **extra: object) -> SimpleNamespace:
    transfer = SimpleNamespace(is_ec_producer=False, get_from_extra_config=lambda key, default: extra.get(key, default))
    return SimpleNamespace(ec_transfer_config=transfer, model_config=SimpleNamespace(dtype=dtype))


@dataclass
class Request:
    """`rows`: the encoder embeddings that the engine expects of each item. `fields`: of the items' data."""

    request_id: str
    identifiers: list[str]
    rows: list[int]
    fields: tuple[str, ...] = ("pixel_values", "image_grid_thw")
    mm_features: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.mm_features, offset = [], 0
        for name, rows in zip(self.identifiers, self.rows, strict=True):
            position = SimpleNamespace(offset=offset, length=rows)
            data = dict.fromkeys(self.fields)
            self.mm_features.append(SimpleNamespace(identifier=name, mm_position=position, data=data))
            offset += rows

    def get_num_encoder_embeds(self, index: int) -> int:
        return self.rows[index]


class Engine:
    """A scheduler's connector and those of its workers, called in the order in which vLLM calls them."""

    def __init__(self, connector_class: type, workers: int = 1, dtype: torch.dtype = torch.float32, **extra) -> None:
        given = config(dtype, **({"bind": "tcp://127.0.0.1:0"} | extra))
        self.scheduler = connector_class(given, ECConnectorRole.SCHEDULER)
        self.workers = [connector_class(given, ECConnectorRole.WORKER) for _ in range(workers)]
        self.freed: list[str] = []  # items that the next step takes out of the cache
        self.caches: list[dict[str, torch.Tensor]] = [{} for _ in range(workers)]

    def step(self, request: Request, computed: int = 0) -> list[str] | None:
        """The items that the engine has to encode itself in the step that takes the request, of which `computed` tokens
        are done; None when the request is put off."""
        if not self.scheduler.ensure_cache_available(request, computed):
            return None
        own = []
        for index, name in enumerate(request.identifiers):
            if all(name in cache for cache in self.caches):
                continue
            if not self.scheduler.has_cache_item(name):
                own.append(name)
            self.scheduler.update_state_after_alloc(request, index)
        metadata = self.scheduler.build_connector_meta(SimpleNamespace(free_encoder_mm_hashes=self.freed))
        self.freed = []
        for worker, cache in zip(self.workers, self.caches, strict=True):
            worker.bind_connector_metadata(metadata)
            worker.start_load_caches(cache)
        meta = self.workers[0].build_connector_worker_meta()
        self.scheduler.update_connector_output(SimpleNamespace(ec_connector_worker_meta=meta))
        return own
