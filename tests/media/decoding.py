"""Decodes files in a process of its own, so that a crash is a failed test and not the end of the test run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

_CHILD = """
import sys
from pathlib import Path
import numpy as np
from encode_server.errors import EncodeError
from encode_server.media.audio import decode_audio
from encode_server.media.limits import MediaLimits

for path in map(Path, sys.argv[2:]):
    print(path.name, flush=True)
    try:
        np.save(path.with_suffix(".npy"), decode_audio(path.read_bytes(), int(sys.argv[1]), MediaLimits()))
    except EncodeError as error:
        path.with_suffix(".error").write_text(type(error).__name__ + ": " + error.message)
"""


def decode_apart(files: dict[str, bytes], rate: int, folder: Path) -> dict[str, np.ndarray | str]:
    """What `decode_audio` makes of each file at `rate` (Hz): its samples, or its error's type and message.

    A process that crashes fails the test, with the name of the file it was at.
    """
    paths = []
    for number, data in enumerate(files.values()):
        paths.append(folder / f"{number}.bin")
        paths[-1].write_bytes(data)
    names = dict(zip((path.name for path in paths), files, strict=True))
    command = [sys.executable, "-c", _CHILD, str(rate), *map(str, paths)]
    # Memory that is released twice ends the process there and then, and not sometime later.
    environment = {**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    reached = run.stdout.split()
    assert run.returncode == 0, f"exit {run.returncode} at {names[reached[-1]] if reached else 'start'}: {run.stderr}"
    return {name: _outcome(folder / file) for file, name in names.items()}


def _outcome(path: Path) -> np.ndarray | str:
    samples = path.with_suffix(".npy")
    return np.load(samples) if samples.exists() else path.with_suffix(".error").read_text()
