"""What a server is: versions, model, options. For `/server_info`, and for whoever writes a report of a fault."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import TYPE_CHECKING, Any

import msgspec

from encode_server import __version__
from encode_server.runtime.cores import usable_cores
from encode_server.settings import redacted

if TYPE_CHECKING:
    from encode_server.service.server import Server

PACKAGES = ("torch", "transformers", "av", "pillow", "fastapi", "uvicorn", "pyzmq", "numpy")


def server_info(server: Server) -> dict[str, Any]:
    """Plain values, ready to be JSON; no key, no credential of a URL. Reads files: call it in a worker thread."""
    encoding = server.encoding
    loaded = encoding.engine.info if encoding is not None else None
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "model": server.model_name,
        "served_model_names": server.model_names,
        "revision": server.settings.revision,
        "encoder": None if loaded is None else msgspec.to_builtins(loaded, str_keys=True),
        "state": server.unavailable() or "ready",
        "usable_cores": usable_cores(),
        "machine_cores": os.cpu_count(),
        "settings": redacted(server.settings),
        "given": sorted(server.settings.model_fields_set),
    }


def models(server: Server) -> dict[str, Any]:
    """The model by each of its names, as OpenAI's `/v1/models` has it. `root`: the checkpoint, as the operator gave it.
    `pools`: by modality, how items can be pooled, once the encoder is loaded."""
    encoding = server.encoding
    info = encoding.engine.info if encoding is not None else None
    modalities = sorted(encoding.pipeline.modalities) if encoding is not None else []
    return {
        "object": "list",
        "data": [
            {
                "id": name,
                "object": "model",
                "created": int(server.started_at),
                "owned_by": "encode_server",
                "root": server.settings.model,
                "modalities": modalities,
                "pools": {} if info is None else {modality: info.pools(modality) for modality in modalities},
            }
            for name in server.model_names
        ],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
