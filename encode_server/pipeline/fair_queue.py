"""The queue in front of the batcher: clients and modalities take turns, and so do the pieces of large items."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping

from encode_server.pipeline.jobs import Job, Piece, Work
from encode_server.wire.modality import Modality

_Entry = tuple[Job, deque[Piece]]
_Lane = tuple[str, Modality]


class FairQueue:
    """Jobs in lanes, one per client and modality, served in turn.

    So neither a client with a thousand items nor one with a ten-minute video holds back another's image.
    """

    def __init__(self, cost: Callable[[Piece], int] = lambda piece: piece.cost) -> None:
        """`cost`: what a piece takes of a batch's budget."""
        self._cost = cost
        self._lanes: OrderedDict[_Lane, deque[_Entry]] = OrderedDict()  # in the order of their turns; none is empty
        self.work: dict[Modality, Work] = {}  # of all pieces queued

    def __len__(self) -> int:
        return sum(len(pieces) for lane in self._lanes.values() for _, pieces in lane)

    def put(self, job: Job) -> None:
        """Queue all pieces of an item at the end of its lane; a health probe's lane has the next turn."""
        key = (job.client, job.modality)
        self._lanes.setdefault(key, deque()).append((job, deque(job.pieces)))
        if job.reserved:
            self._lanes.move_to_end(key, last=False)
        self._count(job, job.pieces, 1)

    def take(self, budgets: Mapping[Modality, int], is_live: Callable[[Job], bool]) -> list[Piece]:
        """A batch: pieces of the modality whose turn it is, up to its budget, and at least one piece if there is any.

        One piece of each lane in turn. Items that are not live any more are dropped. What does not fit ends the
        batch and is first in the next one, so that nothing smaller overtakes it forever.
        """
        batch: list[Piece] = []
        total = 0
        while True:
            served = False
            for key in list(self._lanes):
                if batch and key[1] is not batch[0].job.modality:
                    continue
                entry = self._head(key, is_live)
                if entry is None:
                    continue
                job, pieces = entry
                cost = self._cost(pieces[0])
                if batch and total + cost > budgets[job.modality]:
                    return batch
                total += cost
                piece = pieces.popleft()
                self._count(job, (piece,), -1)
                batch.append(piece)
                self._rotate(key)
                served = True
            if not served:
                return batch

    def drain(self) -> list[Job]:
        """Everything queued, taken out."""
        jobs = [job for lane in self._lanes.values() for job, _ in lane]
        self._lanes.clear()
        self.work.clear()
        return jobs

    def _head(self, key: _Lane, is_live: Callable[[Job], bool]) -> _Entry | None:
        """The first live item of a lane, or None after removing the lane."""
        lane = self._lanes[key]
        while lane:
            job, pieces = lane[0]
            if is_live(job):
                return lane[0]
            self._count(job, pieces, -1)
            lane.popleft()
        del self._lanes[key]
        return None

    def _count(self, job: Job, pieces: Iterable[Piece], sign: int) -> None:
        work = self.work.setdefault(job.modality, Work())
        for piece in pieces:
            work.patches += sign * piece.cost
            work.pairs += sign * piece.pairs

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
