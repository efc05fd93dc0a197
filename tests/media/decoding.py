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


_MEASURE = """
import re, sys
from pathlib import Path
from encode_server.media.audio import decode_audio
from encode_server.media.image import decode_image
from encode_server.media.limits import MediaLimits
from encode_server.media.video import decode_video

def kilobytes(field):
    return int(re.search(field + ":[^0-9]*([0-9]+)", Path("/proc/self/status").read_text())[1])

decoders = {
    "image": lambda data: decode_image(data, MediaLimits(slow_formats=True)),
    "video": lambda data: decode_video(data, lambda info: range(info.total_num_frames), MediaLimits())[0],
    "audio": lambda data: decode_audio(data, 16_000, MediaLimits()),
}
decode = decoders[sys.argv[1]]
small, large = (Path(path).read_bytes() for path in sys.argv[2:])
decode(small)  # what libraries hold for good
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # begins a new maximum
decoded = decode(large)
print(kilobytes("VmHWM") - before)
"""


def memory_apart(modality: str, small: bytes, large: bytes, folder: Path) -> int:
    """The most bytes that a process holds while it decodes `large`, beside the file, after it has decoded `small`."""
    paths = [folder / "small", folder / "large"]
    for path, data in zip(paths, (small, large), strict=True):
        path.write_bytes(data)
    command = [sys.executable, "-c", _MEASURE, modality, *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return 1024 * int(run.stdout)
