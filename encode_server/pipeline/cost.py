"""What a batch costs the device, learnt from the batches it has executed."""

from __future__ import annotations

from collections import deque

import numpy as np

KEPT = 128  # batches that are remembered
EVERY = 8  # batches between two fits
TELLING = 0.05  # smallest singular value, against the largest, from which batches differ enough to tell parts apart
HIGHEST = 1 / 256  # patches per pair: a picture of 256 patches counts for at most twice as many


class ForwardCost:
    """The cost of a forward in patches' worth of time.

    Linear layers cost by the patch, attention by the pair of patches that attend to each other, and their ratio depends
    on the tower and the device. So seconds = fixed + a × patches + b × pairs is fitted to the last batches by least
    squares, every batch's error relative to its own time, and the cost is patches + b / a × pairs. Until batches of
    unlike pictures have told the parts apart, patches alone count.
    """

    def __init__(self) -> None:
        self.patches_per_pair = 0.0
        self._seen: deque[tuple[int, int, float]] = deque(maxlen=KEPT)
        self._new = 0

    def of(self, patches: int, pairs: int) -> int:
        """The cost of a piece of work, in patches."""
        return patches + round(self.patches_per_pair * pairs)

    def observe(self, patches: int, pairs: int, seconds: float) -> None:
        """A batch of so many patches and pairs took so long."""
        if seconds <= 0:
            return
        self._seen.append((patches, pairs, seconds))
        self._new += 1
        if self._new >= EVERY:
            self._new = 0
            self._fit()

    def _fit(self) -> None:
        patches, pairs, seconds = np.array(self._seen, dtype=np.float64).T
        columns = np.stack([np.ones_like(seconds), patches, pairs], axis=1) / seconds[:, None]
        scale = np.linalg.norm(columns, axis=0)
        if not scale.all():
            return  # a modality without full attention
        solution, _, _, singular = np.linalg.lstsq(columns / scale, np.ones_like(seconds), rcond=None)
        if singular[-1] < TELLING * singular[0]:
            return
        _, per_patch, per_pair = solution / scale
        if per_patch > 0:
            self.patches_per_pair = float(np.clip(per_pair / per_patch, 0.0, HIGHEST))
