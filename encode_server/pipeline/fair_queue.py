"""The queue in front of the batcher: items take turns, so that a large one cannot hold back the small ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

from encode_server.modality import Modality
from encode_server.pipeline.work import Placement, Work


class FairQueue:
    """Work by item. A batch takes from the items in the order they came, one piece of each in turn."""

    def __init__(self) -> None:
        self._items: deque[tuple[Placement, deque[Work]]] = deque()

    def __len__(self) -> int:
        return sum(len(works) for _, works in self._items)

    def put(self, placement: Placement) -> None:
        """Queue all work of an item; an urgent one goes first."""
        entry = (placement, deque(placement.works))
        if placement.urgent:
            self._items.appendleft(entry)
        else:
            self._items.append(entry)

    def take(self, budgets: Mapping[Modality, int], wanted: Callable[[Placement], bool]) -> list[Work]:
        """Work of one modality, that of the item at the front, up to its budget; at least one piece if there is any.

        Items that are not `wanted` any more are dropped. An item with work left goes to the end of the queue.
        """
        batch: list[Work] = []
        passed: list[tuple[Placement, deque[Work]]] = []
        served: list[tuple[Placement, deque[Work]]] = []
        total = 0
        while self._items:
            placement, works = self._items.popleft()
            if not wanted(placement):
                continue
            if batch and placement.modality is not batch[0].placement.modality:
                passed.append((placement, works))
                continue
            if batch and total + works[0].cost > budgets[placement.modality]:
                passed.append((placement, works))
                break  # no smaller one overtakes it: it would wait for ever
            total += works[0].cost
            batch.append(works.popleft())
            if works:
                served.append((placement, works))
        self._items.extendleft(reversed(passed))
        self._items.extend(served)
        if batch and served and total < budgets[batch[0].placement.modality]:
            self._top_up(batch, total, budgets[batch[0].placement.modality])
        return batch

    def drain(self) -> list[Placement]:
        """Everything queued, taken out."""
        placements = [placement for placement, _ in self._items]
        self._items.clear()
        return placements

    def _top_up(self, batch: list[Work], total: int, budget: int) -> None:
        """Fill what is left of the budget with further pieces of the items that have some, when nobody else waits."""
        modality = batch[0].placement.modality
        if any(placement.modality is not modality for placement, _ in self._items):
            return
        for _, works in list(self._items):
            while works and total + works[0].cost <= budget:
                total += works[0].cost
                batch.append(works.popleft())
        self._items = deque(entry for entry in self._items if entry[1])
