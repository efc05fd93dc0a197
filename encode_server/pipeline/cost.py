"""What a batch costs the device, learnt from the batches it has executed."""

from __future__ import annotations

from collections import deque

import numpy as np

REMEMBERED_BATCHES = 128
BATCHES_PER_FIT = 8
LEAST_SINGULAR = 0.05  # smallest singular value, against the largest, from which batches tell the parts of a cost apart
MOST_PATCHES_PER_PAIR = 1 / 256  # an image of 256 patches counts for at most twice as many


class ForwardCost:
    """The cost of a forward in patches' worth of time.

    Linear layers cost by the patch, attention by the pair of patches that attend to each other, and their ratio depends
    on the tower and the device. So seconds = fixed + a × patches + b × pairs is fitted to the last batches by least
    squares, every batch's error relative to its own time, and the cost is patches + b / a × pairs. Until batches of
    unlike images have told the parts apart, patches alone count.
    """

    def __init__(self) -> None:
        self.patches_per_pair = 0.0
        self._seconds: tuple[float, float, float] | None = None  # fixed, for a patch, for a pair
        self._seen: deque[tuple[int, int, float]] = deque(maxlen=REMEMBERED_BATCHES)
        self._new = 0
        self._rate: float | None = None

    def of(self, patches: int, pairs: int) -> int:
        """The cost of a piece of work, in patches."""
        return patches + round(self.patches_per_pair * pairs)

    def seconds(self, patches: int, pairs: int) -> float | None:
        """How long a forward of so many patches and pairs should take; None before enough batches have been seen."""
        if self._seconds is None:
            return None
        fixed, per_patch, per_pair = self._seconds
        return max(0.0, fixed + per_patch * patches + per_pair * pairs)

    @property
    def parts(self) -> tuple[float, float, float] | None:
        """Seconds of a forward as such, of a patch, of a pair; None before enough batches have been seen."""
        return self._seconds

    @property
    def patches_per_s(self) -> float | None:
        """Patches that a second more of a forward executes, the fixed cost of a batch apart: that cost would make a
        device look slow whose batches happen to be small. None before batches of unlike sizes have been seen."""
        return self._rate

    def observe(self, patches: int, pairs: int, seconds: float) -> None:
        """A batch of so many patches and pairs took so long."""
        if seconds <= 0:
            return
        self._seen.append((patches, pairs, seconds))
        self._new += 1
        if self._new >= BATCHES_PER_FIT:
            self._new = 0
            self._fit()

    def _fit(self) -> None:
        patches, pairs, seconds = np.array(self._seen, dtype=np.float64).T
        columns = np.stack([np.ones_like(seconds), patches, pairs], axis=1) / seconds[:, None]
        scale = np.linalg.norm(columns, axis=0)
        told = scale > 0  # no pairs are seen of a modality without full attention
        solution = np.zeros(3)
        # Parts that the batches cannot tell apart share their cost: the solution of least norm.
        fitted, _, _, singular = np.linalg.lstsq(columns[:, told] / scale[told], np.ones_like(seconds), rcond=None)
        solution[told] = fitted / scale[told]
        fixed, per_patch, per_pair = (float(value) for value in solution)
        self._seconds = (fixed, per_patch, per_pair)
        marginal = float((per_patch * patches + per_pair * pairs).sum() / patches.sum())
        apart = singular[-1] >= LEAST_SINGULAR * singular[0]
        self._rate = 1 / marginal if apart and marginal > 0 else None
        if not told.all() or singular[-1] < LEAST_SINGULAR * singular[0] or per_patch <= 0:
            return
        self.patches_per_pair = float(np.clip(per_pair / per_patch, 0.0, MOST_PATCHES_PER_PAIR))
