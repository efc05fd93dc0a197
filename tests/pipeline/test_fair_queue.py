"""Batches keep to their budget, nobody is starved, and nothing is lost or doubled."""

import random
from dataclasses import dataclass, field

from encode_server.pipeline.fair_queue import FairQueue
from encode_server.wire.modality import Modality

BUDGETS = dict.fromkeys(Modality, 100)


@dataclass(eq=False)
class Piece:
    job: "Item"
    cost: int
    pairs: int = 0


@dataclass(eq=False)
class Item:
    """As much of a Job as the queue looks at."""

    name: str
    modality: Modality = Modality.IMAGE
    client: str = "a"
    reserved: bool = False
    pieces: list[Piece] = field(default_factory=list)

    def cut(self, *costs: int) -> "Item":
        self.pieces = [Piece(self, cost) for cost in costs]
        return self


def names(batch):
    return [piece.job.name for piece in batch]


def take(queue, wanted=lambda item: True):
    return queue.take(BUDGETS, wanted)


def test_budget_and_order():
    queue = FairQueue()
    for name in "abcd":
        queue.put(Item(name).cut(40))
    assert names(take(queue)) == ["a", "b"]
    assert names(take(queue)) == ["c", "d"]
    assert take(queue) == []


def test_what_exceeds_the_budget_goes_alone_and_is_not_overtaken_for_ever():
    queue = FairQueue()
    queue.put(Item("small 1").cut(40))
    queue.put(Item("huge").cut(500))
    queue.put(Item("small 2").cut(40))
    assert names(take(queue)) == ["small 1"]
    assert names(take(queue)) == ["huge"]
    assert names(take(queue)) == ["small 2"]


def test_a_long_video_gives_way_between_its_pieces():
    queue = FairQueue()
    queue.put(Item("film", Modality.VIDEO).cut(*[90] * 30))
    assert names(take(queue)) == ["film"]
    queue.put(Item("picture").cut(40))
    queue.put(Item("clip", Modality.VIDEO).cut(90))
    waited = [names(take(queue)) for _ in range(4)]
    assert ["picture"] in waited and ["clip"] in waited


def test_a_client_with_much_work_leaves_every_other_its_turn():
    queue = FairQueue()
    for index in range(1000):
        queue.put(Item(f"greedy {index}", client="greedy").cut(40))
    queue.put(Item("modest", client="modest").cut(40))
    assert "modest" in names(take(queue))


def test_an_urgent_item_is_next():
    queue = FairQueue()
    for name in "abc":
        queue.put(Item(name).cut(90))
    queue.put(Item("probe", Modality.AUDIO, reserved=True, client="").cut(3))
    assert names(take(queue)) == ["probe"]


def test_unwanted_items_are_dropped():
    queue = FairQueue()
    for name in "abc":
        queue.put(Item(name).cut(30))
    assert names(take(queue, lambda item: item.name != "b")) == ["a", "c"]
    assert len(queue) == 0


def test_every_piece_comes_out_once_whatever_arrives():
    rng, queue = random.Random(3), FairQueue()
    put, got = [], []
    for step in range(3000):
        if rng.random() < 0.4:
            item = Item(str(step), rng.choice(list(Modality)), rng.choice("abc"), rng.random() < 0.02)
            queue.put(item.cut(*[rng.randint(1, 150) for _ in range(rng.randint(1, 6))]))
            put += item.pieces
        else:
            batch = take(queue)
            assert len({piece.job.modality for piece in batch}) <= 1
            assert sum(piece.cost for piece in batch) <= 100 or len(batch) == 1
            got += batch
    while batch := take(queue):
        got += batch
    assert len(got) == len(put) and set(map(id, got)) == set(map(id, put))


def test_the_budget_is_in_what_the_device_takes_for_them():
    """Ten of cost 10 fill a batch; where each takes the time of 50, two do."""
    queue = FairQueue(lambda work: 5 * work.cost)
    for number in range(10):
        queue.put(Item(str(number)).cut(10))
    assert [len(take(queue)) for _ in range(5)] == [2] * 5
