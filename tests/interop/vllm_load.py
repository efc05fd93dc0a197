"""Runs where vLLM is installed: its own connector loads entries of a store, and writes what it got for comparison.

usage: vllm_load.py STORE OUT IDENTIFIER…
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm.config.ec_transfer import ECTransferConfig
from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorRole
from vllm.distributed.ec_transfer.ec_connector.example_connector import (
    ECExampleConnector,
    ECExampleConnectorMetadata,
    MMMeta,
)

store, out, *identifiers = sys.argv[1:]
transfer = ECTransferConfig(
    ec_connector="ECExampleConnector",
    ec_role="ec_consumer",
    ec_connector_extra_config={"shared_storage_path": store},
)
connector = ECExampleConnector(SimpleNamespace(ec_transfer_config=transfer, model_config=None), ECConnectorRole.WORKER)
assert not connector.has_cache_item("never-stored")
metadata = ECExampleConnectorMetadata()
for identifier in identifiers:
    assert connector.has_cache_item(identifier), identifier
    metadata.add_mm_data(MMMeta.make_meta(identifier, 0))
connector.bind_connector_metadata(metadata)
loaded: dict[str, torch.Tensor] = {}
connector.start_load_caches(loaded)
for identifier, tensor in loaded.items():
    Path(out, identifier).write_bytes(tensor.contiguous().view(torch.uint8).numpy().tobytes())
print(json.dumps({name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in loaded.items()}))
