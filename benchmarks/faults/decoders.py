"""Faults for the decoders of a server under test: what an image's last bytes say happens when it is decoded."""

import importlib.abc
import importlib.machinery
import os
import signal
import sys

CRASH = b"crash the decoder"  # the process dies of SIGSEGV


def _faulty(decode_image):
    def run(data, limits):
        if data.endswith(CRASH):
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode_image(data, limits)

    return run


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        self._loader.exec_module(module)
        module.decode_image = _faulty(module.decode_image)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "encode_server.media.image":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader = _Loader(spec.loader)
        return spec


def install():
    """Break the decoder in every process that imports it from now on."""
    sys.meta_path.insert(0, _Finder())
