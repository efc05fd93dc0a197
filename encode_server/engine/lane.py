"""A GPU's way through a batch: one stream computes, another carries embeddings out, and the host sleeps meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock

import torch


class Lane:
    """Runs batches of several threads one after another on one stream, with no gap between two of them.

    Two batches on two streams share the device and both end late, and each stream keeps memory of its own. On one
    stream the second batch is queued while the first computes, and uses the first one's memory again.
    """

    def __init__(self, device: str) -> None:
        """`device`: torch's name of this rank's GPU. What was queued on its current stream comes before all batches."""
        self._lock = Lock()
        self._compute = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._out = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._compute.wait_stream(torch.cuda.current_stream(device))

    def run(self, forward: Callable[[], list[torch.Tensor]], write: Callable[[list[torch.Tensor]], None]) -> float:
        """Queue `forward`, then `write` of what it returns, and wait until the device has done both.

        `write` may only queue copies to the host. Returns the seconds that the device took for `forward`, without those
        it spent on earlier batches. What either raises is raised; the device may then still be busy with this batch.
        """
        began = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # Waiting for a blocking event sleeps; other waits of CUDA's spin, and take a core from the preparers.
        ended = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        written = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        # Two threads that launch in turns would mix their batches on the stream.
        with self._lock, torch.cuda.stream(self._compute):
            began.record(self._compute)
            embeddings = forward()
            ended.record(self._compute)
        with torch.cuda.stream(self._out):
            self._out.wait_event(ended)
            write(embeddings)
            written.record(self._out)
        written.synchronize()
        # Only now may `embeddings` go: their memory belongs to the other stream, which would use it again immediately.
        del embeddings
        return float(began.elapsed_time(ended)) / 1e3
