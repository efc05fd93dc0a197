"""The queue in front of the batcher: clients and modalities take turns, and so do the pieces of large items."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping

from encode_server.pipeline.work import Placement, Work
from encode_server.wire.modality import Modality

_Entry = tuple[Placement, deque[Work]]
_Lane = tuple[str, Modality]


class FairQueue:
    """Work in lanes, one per client and modality, served in turn.

    So neither a client with a thousand items nor one with a ten-minute video holds back another's picture.
    """

    def __init__(self, cost: Callable[[Work], int] = lambda work: work.cost) -> None:
        """`cost`: what a piece takes of a batch's budget."""
        self._cost = cost
        self._lanes: OrderedDict[_Lane, deque[_Entry]] = OrderedDict()  # in the order of their turns; none is empty

    def __len__(self) -> int:
        return sum(len(works) for lane in self._lanes.values() for _, works in lane)

    def put(self, placement: Placement) -> None:
        """Queue all work of an item at the end of its lane; an urgent lane has the next turn."""
        key = (placement.client, placement.modality)
        self._lanes.setdefault(key, deque()).append((placement, deque(placement.works)))
        if placement.urgent:
            self._lanes.move_to_end(key, last=False)

    def take(self, budgets: Mapping[Modality, int], wanted: Callable[[Placement], bool]) -> list[Work]:
        """A batch: work of the modality whose turn it is, up to its budget, and at least one piece if there is any.

        One piece of each lane in turn. Items that are not `wanted` any more are dropped. What does not fit ends the
        batch and is first in the next one, so that nothing smaller overtakes it for ever.
        """
        batch: list[Work] = []
        total = 0
        while True:
            served = False
            for key in list(self._lanes):
                if batch and key[1] is not batch[0].placement.modality:
                    continue
                entry = self._head(key, wanted)
                if entry is None:
                    continue
                placement, works = entry
                cost = self._cost(works[0])
                if batch and total + cost > budgets[placement.modality]:
                    return batch
                total += cost
                batch.append(works.popleft())
                self._rotate(key)
                served = True
            if not served:
                return batch

    def drain(self) -> list[Placement]:
        """Everything queued, taken out."""
        placements = [placement for lane in self._lanes.values() for placement, _ in lane]
        self._lanes.clear()
        return placements

    def _head(self, key: _Lane, wanted: Callable[[Placement], bool]) -> _Entry | None:
        """The first item of a lane that is still wanted, or None after removing the lane."""
        lane = self._lanes[key]
        while lane:
            if wanted(lane[0][0]):
                return lane[0]
            lane.popleft()
        del self._lanes[key]
        return None

    def _rotate(self, key: _Lane) -> None:
        """A lane has been served: its item gives way to the lane's next, the lane to the other lanes."""
        lane = self._lanes[key]
        entry = lane.popleft()
        if entry[1]:
            lane.append(entry)
        if lane:
            self._lanes.move_to_end(key)
        else:
            del self._lanes[key]
