"""Stand-in for SGLang's compiled kernel package: every name exists, and raises when called."""

import importlib.abc
import importlib.machinery
import sys
import types

from sitecustomize import _Missing

__path__ = []
__version__ = "0"


def _stand_in(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Missing(name)


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.startswith("sgl_kernel."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = _stand_in
        return module

    def exec_module(self, module):
        pass


__getattr__ = _stand_in
sys.meta_path.insert(0, _Submodules())
