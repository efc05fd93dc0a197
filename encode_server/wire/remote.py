"""NIXL's Python package, under any of its names."""

from __future__ import annotations

import importlib
from typing import Any

NAMES = ("nixl", "nixl_cu12", "nixl_cu13")


def agent_types() -> tuple[Any, Any]:
    """The classes of an agent and of its configuration. Raises ImportError."""
    for name in NAMES:
        try:
            module = importlib.import_module(f"{name}._api")
        except ModuleNotFoundError:
            continue
        return module.nixl_agent, module.nixl_agent_config
    raise ImportError("no module named nixl")
