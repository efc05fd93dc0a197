"""Copies from the host to a device that make nobody wait."""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A CPU `tensor` of this process on `device`; on a GPU the copy is queued, and the host goes on immediately.

    Only page-locked memory is copied without the host's help. torch keeps such memory for later calls, and keeps this
    copy's until the device has read it, so `tensor` may be changed or dropped immediately. Tensors over the arena
    are page-locked already: they take `.to(device, non_blocking=True)`.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
