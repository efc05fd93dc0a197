"""Faults for the ranks of a server under test: put this folder on its PYTHONPATH.

A picture's grid says what happens when its forward runs: no real input kills an encoder on demand.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time

import decoders

KILL = [1, 2, 26]  # 364 x 28 pixels: the rank dies
HANG = [1, 2, 28]  # 392 x 28 pixels: the forward never ends
MEMORY = [1, 2, 30]  # 420 x 28 pixels: the device is too small for a batch of more than two of these
ERROR = [1, 2, 32]  # 448 x 28 pixels: the forward raises
ALONE = [1, 2, 34]  # 476 x 28 pixels: as MEMORY, on the first rank of several alone


def _faulty(forward):
    def run(self, modality, items):
        import torch
        import torch.distributed

        grids = [item["grid_thw"].tolist() for item in items if "grid_thw" in item]
        if KILL in grids:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in grids:
            time.sleep(3600)
        if grids.count(MEMORY) > 2:
            raise torch.OutOfMemoryError("out of memory, as the test wants it")
        if grids.count(ALONE) > 2 and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
            raise torch.OutOfMemoryError("out of memory on one rank, as the test wants it")
        if ERROR in grids:
            raise RuntimeError("an error, as the test wants it")
        return forward(self, modality, items)

    return run


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        module.Encoder.forward = _faulty(module.Encoder.forward)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "encode_server.models.encoder":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = _Loader(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
decoders.install()
