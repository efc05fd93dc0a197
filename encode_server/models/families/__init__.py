"""One object per architecture with what both sides need: ranks to load and run it, the front to prepare for it."""

from __future__ import annotations

from importlib import import_module

from encode_server.models.checkpoint import Checkpoint
from encode_server.models.families.base import Family
from encode_server.models.registry import known


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint, with caches of its own.

    Raises:
        StartupError: the architecture is not supported.
    """
    architecture = known(checkpoint)
    if architecture is None:
        from encode_server.models.families.generic import Generic

        return Generic(checkpoint)
    module, name = architecture.family.split(":")
    family: Family = getattr(import_module(f"{__name__}.{module}"), name)(checkpoint)
    return family
