"""How many replicas a load needs, by the seconds of work that they hold. Ray Serve's controller calls it.

The module is sent to the controller by value, so it imports nothing of this package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any


class ByBacklog:
    """An autoscaling policy of Ray Serve."""

    def __init__(self, target_backlog_s: float) -> None:
        """`target_backlog_s`: seconds of work that a replica should hold at most, on average."""
        self._target_s = target_backlog_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The replicas that there should be, and no state. `context`: Ray Serve's `AutoscalingContext`."""
        told = (context.aggregated_metrics or {}).get("backlog_s", {})
        wanted = replicas_for(told.values(), context.target_num_replicas, self._target_s)
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(low, min(high, wanted)), {}


def replicas_for(backlogs_s: Iterable[float], replicas: int, target_s: float) -> int:
    """The number of replicas whose share of all the work is `target_s` seconds. One replica less than there are only
    when their shares would still be half the target: a number between needs no change."""
    total_s = sum(backlogs_s)
    needed = math.ceil(total_s / target_s)
    if needed > replicas:
        return min(needed, 2 * replicas)
    if replicas > 1 and total_s / (replicas - 1) < target_s / 2:
        return replicas - 1
    return replicas
