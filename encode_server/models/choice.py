"""The choice between torch's operators and a kernel that not every container and GPU can run."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from encode_server.errors import first_line

log = logging.getLogger(__name__)

T = TypeVar("T")


def choose(device: torch.device, plain: T, kernel: Callable[[], T], without: str) -> T:
    """What `kernel` returns; `plain` off a GPU, or where `kernel` raises: it imports, and tries what it returns.

    Triton needs a C compiler when a program starts, and supports not every GPU: both show in a first call. `without`:
    what the log says is slower then.
    """
    if device.type != "cuda":
        return plain
    try:
        return kernel()
    except Exception as error:
        log.warning("%s: %s: %s", without, type(error).__name__, first_line(error))
        return plain
