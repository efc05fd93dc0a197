"""torch's profiler around a rank's forwards, its trace written to a file."""

from __future__ import annotations

from typing import Any

from encode_server.engine.device import profiler_activity


class Profiler:
    """At most one profile at a time. `device`: of the rank's encoder."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._profile: Any = None
        self._path = ""
        self._forwards_left: int | None = None

    @property
    def running(self) -> bool:
        """Whether forwards are being recorded: only those of the thread that calls `start` are."""
        return self._profile is not None

    def start(self, path: str, forwards: int | None) -> None:
        """Profile until `stop`, or for so many forwards. Raises ValueError when a profile is running."""
        from torch.profiler import ProfilerActivity, profile

        if self._profile is not None:
            raise ValueError("a profile is already running")
        activities = [ProfilerActivity.CPU]
        if self._device != "cpu":
            activities.append(profiler_activity(self._device))
        started = profile(activities=activities)
        started.start()
        self._profile, self._path, self._forwards_left = started, path, forwards

    def stop(self) -> None:
        """End the profile and write its trace. Raises ValueError when none is running, OSError for a full disk."""
        if self._profile is None:
            raise ValueError("no profile is running: one ends by itself after its forwards")
        ended, self._profile = self._profile, None
        ended.stop()
        ended.export_chrome_trace(self._path)

    def forwarded(self) -> None:
        """Count a forward; the last one asked for ends the profile."""
        if self._profile is None or self._forwards_left is None:
            return
        self._forwards_left -= 1
        if self._forwards_left == 0:
            self.stop()
