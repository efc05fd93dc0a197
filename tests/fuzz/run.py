"""Fuzz one target with coverage: `python -m tests.fuzz.run TARGET [options of libFuzzer] [folders of inputs]`."""

from __future__ import annotations

import logging
import sys

import atheris

with atheris.instrument_imports(
    include=["encode_server", "uvicorn.protocols", "python_multipart", "starlette.formparsers"]
):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Never returns; the exit status is not 0 when an input made the target raise, hang or crash."""
    logging.disable(logging.CRITICAL)
    name = sys.argv.pop(1)
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


main()
