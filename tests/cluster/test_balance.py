"""Which replica a request goes to, and how many there should be."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from encode_server.cluster.balance import Replica, least_loaded, ranked
from encode_server.cluster.scaling import ByBacklog, replicas_for

KEYS = [str(number) for number in range(600)]


def idle(*names: str) -> list[Replica]:
    return [Replica(name, 0.0, 0) for name in names]


def owner(key: str, replicas: list[Replica]) -> str:
    return ranked(key, replicas, lambda one: one)[0][0].name


def test_keys_are_shared_out_and_stay_where_they_are_when_another_replica_leaves_or_comes():
    before = {key: owner(key, idle("a", "b", "c")) for key in KEYS}
    assert all(count > 120 for count in Counter(before.values()).values())
    without = {key: owner(key, idle("c", "a")) for key in KEYS}
    assert all(without[key] == name for key, name in before.items() if name != "b")
    beside = {key: owner(key, idle("a", "b", "c", "d")) for key in KEYS}
    assert all(beside[key] in (name, "d") for key, name in before.items())


def test_an_owner_with_more_work_than_it_should_have_is_asked_last():
    replicas = idle("a", "b", "c")
    name = owner("key", replicas)

    def with_load(backlog_s: float, requests: int) -> list[list[str]]:
        told = [Replica(one.name, backlog_s, requests) if one.name == name else one for one in replicas]
        return [[one.name for one in group] for group in ranked("key", told, lambda one: one)]

    assert with_load(0.4, 8)[0] == [name], "little work is no reason to leave the cache"
    assert with_load(0.6, 0)[-1] == [name] and with_load(0.0, 9)[-1] == [name]
    assert sorted(with_load(0.6, 0)[0] + [name]) == ["a", "b", "c"]


def test_where_all_are_busy_the_owner_is_asked_first():
    told = [Replica(name, 3.0, 40) for name in "abc"]
    assert owner("key", told) == owner("key", idle("a", "b", "c"))


def test_the_others_come_by_their_work():
    told = [Replica("a", 2.0, 0), Replica("b", 0.1, 5), Replica("c", 0.1, 1)]
    assert [one.name for (one,) in least_loaded(told, lambda one: one)] == ["c", "b", "a"]
    assert ranked("key", told[:1], lambda one: one) == [told[:1]] and ranked("key", [], lambda one: one) == []


@pytest.mark.parametrize(
    ("backlogs_s", "there", "wanted"),
    [
        ((), 1, 1),
        ((0.0, 0.0, 0.0), 3, 2),
        ((0.2, 0.3), 2, 2),
        ((0.9, 0.8), 2, 4),
        ((9.0,), 1, 2),
        ((0.1, 0.0), 2, 1),
        ((0.0,), 1, 1),
    ],
)
def test_there_are_as_many_replicas_as_the_work_needs(backlogs_s, there, wanted):
    assert replicas_for(backlogs_s, there, 0.5) == wanted


def test_the_policy_keeps_within_the_bounds_of_the_deployment():
    context = SimpleNamespace(
        aggregated_metrics={"backlog_s": {"r1": 9.0, "r2": 9.0}},
        target_num_replicas=2,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=3,
    )
    assert ByBacklog(0.5)(context)[0] == 3
    context.aggregated_metrics = None
    assert ByBacklog(0.5)(context)[0] == 1
