"""Lets SGLang import on a machine without CUDA: its compiled kernels (sgl_kernel) are replaced by stand-ins that raise
when called. What runs on the CPU engine calls none of them for a small dense model."""

import importlib.abc
import sys


class _Missing:
    def __init__(self, name):
        self.name = name

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{self.name} needs CUDA")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.name}.{name}")


class _OnFirstImportOfSglang(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "sglang":
            sys.meta_path.remove(self)
            _patch_torch()
        return


def _patch_torch():
    import torch._ops
    import torch.library

    found = torch._ops._OpNamespace.__getattr__
    register_fake = torch.library.register_fake

    def op_or_stand_in(self, name):
        try:
            return found(self, name)
        except AttributeError:
            if self.name == "sgl_kernel" and not name.startswith("__"):
                return _Missing(name)
            raise

    def register_unless_sgl(op, func=None, **kwargs):
        if isinstance(op, str) and op.startswith("sgl_kernel::"):
            return (lambda f: f) if func is None else func
        return register_fake(op, **kwargs) if func is None else register_fake(op, func, **kwargs)

    def empty_on_the_cpu(*args, device=None, **kwargs):
        """SGLang's mooncake receiver takes its buffers from `cuda:N` whatever the engine runs on."""
        if device is not None and str(device).startswith("cuda") and not torch.cuda.is_available():
            device = "cpu"
        return empty(*args, device=device, **kwargs)

    empty, torch.empty = torch.empty, empty_on_the_cpu
    torch._ops._OpNamespace.__getattr__ = op_or_stand_in
    torch.library.register_fake = register_unless_sgl


sys.meta_path.insert(0, _OnFirstImportOfSglang())
