"""A region grants disjoint ranges, refuses what has no hole, and merges what comes back."""

from __future__ import annotations

from encode_server.engine.region import Region


def test_room_in_pieces_is_no_room_for_what_is_larger_than_a_piece():
    region = Region(0, 400)
    slots = [region.take(100) for _ in range(4)]
    assert [slot.offset for slot in slots] == [0, 100, 200, 300] and region.take(1) is None
    region.give(slots[0])
    region.give(slots[2])
    assert region.take(101) is None  # 200 are free, in two holes
    region.give(slots[1])
    assert region.take(300).offset == 0


def test_it_may_begin_anywhere():
    region = Region(1000, 100)
    slot = region.take(100)
    assert slot.offset == 1000 and region.take(1) is None
    region.give(slot)
    assert region.take(100) == slot
