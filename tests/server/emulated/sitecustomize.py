"""One emulated GPU for the preparers of a server under test: put this folder on its PYTHONPATH, the repository too.

torch finds a GPU, and whatever a preparer asks of that GPU is computed on the CPU, late, as
`benchmarks.card.device` emulates it. Ranks have to be told `--device cpu`.
"""

import importlib.abc
import importlib.machinery
import sys


def _find_one_gpu(module):
    module.torch.accelerator.is_available = lambda: True
    module.torch.accelerator.device_count = lambda: 1


def _emulate(module):
    class Emulated(module.Preprocessor):
        """Every thread enters the emulation while it prepares an item."""

        def __init__(self, *args, **kwargs):
            from benchmarks.card.device import emulated

            self._emulation = emulated()  # for the life of the process
            self._gpu = self._emulation.__enter__()
            self._gpu.__exit__(None, None, None)  # this thread enters for each item, as all others do
            super().__init__(*args, **kwargs)

        def prepare(self, *args, **kwargs):
            with self._gpu:
                prepared = super().prepare(*args, **kwargs)
            assert self._gpu.streams.pending == 0, "an item goes on while the device still computes"
            return prepared

    module.Preprocessor = Emulated


_CHANGED = {"encode_server.models.on_device": _find_one_gpu, "encode_server.models.preprocess": _emulate}


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, change):
        self._loader, self._change = loader, change

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        self._change(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name not in _CHANGED:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = _Loader(spec.loader, _CHANGED[name])
        return spec


sys.meta_path.insert(0, _Finder())
