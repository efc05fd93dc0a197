"""Pickle programs of the torch objects in SGLang's header, for a front that has no torch."""

from __future__ import annotations

import torch

from encode_server.wire.pickles import program
from encode_server.wire.preparers import Pickle, Pickled


def make(command: Pickle) -> Pickled:
    """`dtype` as torch's dtype, `grid` as an int64 tensor (of one dimension where its rows have one number), `seconds`
    as a float32 tensor."""
    grid = None
    if command.grid is not None:
        tensor = torch.tensor(command.grid, dtype=torch.int64)
        grid = program(tensor.flatten() if tensor.shape[-1] == 1 else tensor)
    seconds = None if command.seconds is None else program(torch.tensor(command.seconds))
    return Pickled(command.job, program(getattr(torch, command.dtype)), grid, seconds)
