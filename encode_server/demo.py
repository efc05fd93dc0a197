"""`encode-server demo`: serve the demo checkpoint, and show it at work from a process beside the server."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

from encode_server.errors import StartupError
from encode_server.runtime.forkserver import Launched
from encode_server.serve import serve
from encode_server.settings import Settings

FIRST_LINE = "Starting the demo checkpoint on {}: a real architecture, its weights are random."
SERVER_GONE = 2  # the tour's exit status when the server was ended meanwhile


def run_demo(settings: Settings, launched: Launched, *, once: bool) -> int:
    """Serve, show it at work, go on until Ctrl-C (with `once`: end after the table).

    Raises StartupError when the server cannot start, or when the tour failed.
    """
    if "log_level" not in settings.model_fields_set:
        settings = settings.model_copy(update={"log_level": "warning"})
    tour = _Tour(once=once)
    try:
        status = serve(settings, launched, on_listening=tour.start)
    finally:
        tour.end()
    if tour.failed:
        raise StartupError("the demo did not work")
    return status


class _Tour:
    """Owner of the tour's process."""

    def __init__(self, *, once: bool) -> None:
        self._once = once
        self._process: subprocess.Popen[bytes] | None = None
        self.failed = False

    def start(self, base_url: str) -> None:
        """Begin, once the server listens on `base_url`."""
        print(FIRST_LINE.format(base_url), flush=True)
        options = ["--once"] if self._once else []
        self._process = subprocess.Popen([sys.executable, "-m", "encode_server.tour", base_url, *options])
        threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()

    def end(self) -> None:
        """End the tour, if it still runs."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """End the server when the tour asks for that, or failed."""
        status = process.wait()
        self.failed = status not in (0, SERVER_GONE, -signal.SIGKILL, -signal.SIGINT)
        if self.failed or (self._once and status == 0):
            os.kill(os.getpid(), signal.SIGTERM)
