"""What the forkserver imports before it forks ranks and preparers."""

from __future__ import annotations

import importlib
import json
import logging

MODULES = (
    # Every rank and every preparer.
    *("torch", "torch.distributed", "torchvision", "transformers", "transformers.modeling_utils", "zmq"),
    # Ranks.
    *("encode_server.engine.rank", "encode_server.models.encoder"),
    # Preparers.
    *("encode_server.prepare.worker", "encode_server.models.preprocess", "encode_server.media.image"),
    *("encode_server.media.video", "encode_server.media.audio", "transformers.video_utils"),
    # The children of one call.
    *("encode_server.models.inspect", "encode_server.runtime.calls", "encode_server.media.samples"),
)


def preload(argument: bytes) -> None:
    """Import what all checkpoints need, and the family's modules where the checkpoint is on this machine already.

    `argument`: JSON with `model` and `revision`. Importing must neither start threads nor initialise CUDA: the children
    of a process with either could not use them.
    """
    for module in MODULES:
        importlib.import_module(module)
    from encode_server.models.inspect import preload_modules

    wanted = json.loads(argument)
    for module in preload_modules(wanted["model"], wanted["revision"]):
        try:
            importlib.import_module(module)
        except ImportError as error:  # the rank will say so where it matters
            logging.getLogger(__name__).warning("%s cannot be imported: %s", module, error)
