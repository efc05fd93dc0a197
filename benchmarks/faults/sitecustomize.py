"""Faults for the ranks and preparers of a server under test: put this folder on its PYTHONPATH.

An image's grid says what happens when its forward runs, and bytes behind its end what happens when it is decoded: no
real input kills an encoder or a decoder on demand.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys
import time

KILL = [1, 2, 26]  # 364 x 28 pixels: the rank dies
HANG = [1, 2, 28]  # 392 x 28 pixels: the forward never ends
MEMORY = [1, 2, 30]  # 420 x 28 pixels: the device is too small for a batch of more than two of these
ERROR = [1, 2, 32]  # 448 x 28 pixels: the forward raises
ALONE = [1, 2, 34]  # 476 x 28 pixels: as MEMORY, on the first rank of several alone

DECODE_CRASH = b"crash the decoder"  # the process dies of SIGSEGV
DECODE_HANG = b"hang the decoder"  # the decoder waits forever
DECODE_SPIN = b"spin the decoder"  # the decoder computes forever
DECODE_MEMORY = b"fill the memory"  # the decoder takes all the memory that there is


def _faulty_decoder(decode_image):
    def run(data, limits):
        if data.endswith(DECODE_CRASH):
            os.kill(os.getpid(), signal.SIGSEGV)
        if data.endswith(DECODE_HANG):
            time.sleep(3600)
        while data.endswith(DECODE_SPIN):
            pass
        if data.endswith(DECODE_MEMORY):
            taken = []
            while True:
                taken.append(bytearray(64 << 20))
        return decode_image(data, limits)

    return run


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


def _break_encoder(module):
    module.Encoder.forward = _faulty(module.Encoder.forward)


def _break_decoder(module):
    module.decode_image = _faulty_decoder(module.decode_image)


def _is_rank(pid):
    try:
        with open(f"/proc/{pid}/comm") as comm:  # noqa: PTH123
            return comm.read().startswith("rank")
    except OSError:
        return False


def _break_signals(module):
    kill = module.Child.kill

    def maybe(self):
        if not _is_rank(self.pid):
            kill(self)

    if os.environ.get("FAULT_UNKILLABLE"):  # ranks stay after SIGKILL, as in a driver that hangs
        module.Child.kill = maybe


_BROKEN = {
    "encode_server.models.encoder": _break_encoder,
    "encode_server.media.image": _break_decoder,
    "encode_server.runtime.forkserver": _break_signals,
}


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, spoil):
        self._loader, self._spoil = loader, spoil

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        self._spoil(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in _BROKEN:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = _Loader(spec.loader, _BROKEN[name])
        return spec


sys.meta_path.insert(0, _Finder())
