"""How much of the time a GPU had something to execute, as its driver counts it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from types import TracebackType
from typing import Self

INTERVAL_MS = 100


class BusySampler:
    """Runs `nvidia-smi` beside a load. `share` is None where there is none, or no GPU is measured.

    Only samples from `after_s` to `after_s + for_s` seconds count: the warm-up and the end don't.
    """

    def __init__(self, device: str, *, after_s: float, for_s: float) -> None:
        self.share: float | None = None
        self._after, self._for = after_s, for_s
        self._process: subprocess.Popen[str] | None = None
        if device == "cuda" and (program := shutil.which("nvidia-smi")) is not None:
            self._command = [program, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
            # nvidia-smi counts all devices of the machine, also those that are hidden from CUDA.
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0"
            self._command += [f"--id={visible.split(',')[0]}", f"--loop-ms={INTERVAL_MS}"]
        else:
            self._command = []

    def __enter__(self) -> Self:
        if self._command:
            self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
            self._started = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is None:
            return
        ran = time.monotonic() - self._started
        self._process.terminate()
        text, _ = self._process.communicate()
        samples = [int(line) for line in text.split() if line.isdigit()]
        # Evenly spaced in time, whatever the program's own start took.
        first, last = (int(len(samples) * at / ran) for at in (self._after, min(ran, self._after + self._for)))
        if chosen := samples[first:last]:
            self.share = sum(chosen) / len(chosen) / 100
