"""Which replica an item goes to: the one whose cache may hold it, unless that one has more work than it should."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")

SPILL_S = 0.5  # less work than this is never a reason to leave the cache
SPILL_RATIO = 2.0


@dataclass(frozen=True)
class Replica:
    """`name`: the same in every process that asks. `backlog_s`: seconds until what the replica holds is encoded, as it
    said last. `requests`: requests that it holds, as far as is known here."""

    name: str
    backlog_s: float
    requests: int


def ranked(key: str, candidates: Sequence[T], replica: Callable[[T], Replica]) -> list[list[T]]:
    """The candidates in groups, the first group to be tried first, and in a group the least loaded.

    The owner of `key` comes first (rendezvous hashing: when a replica leaves, only its own keys move), then all
    others. An owner with more than `SPILL_S` seconds of work, and `SPILL_RATIO` times the least that a replica has, or
    as many times its requests, is left out of the first group: everybody else comes before it.
    """
    told = [(candidate, replica(candidate)) for candidate in candidates]
    if len(told) < 2:
        return [list(candidates)] if told else []
    owner, load = max(told, key=lambda one: _score(key, one[1].name))
    others = [candidate for candidate, _ in told if candidate is not owner]
    if _busy(load, [other for candidate, other in told if candidate is not owner]):
        return [_least_first(others, replica), [owner]]
    return [[owner], _least_first(others, replica)]


def least_loaded(candidates: Sequence[T], replica: Callable[[T], Replica]) -> list[list[T]]:
    """The candidates in groups for a request that belongs to none of them."""
    return [[candidate] for candidate in _least_first(candidates, replica)]


def _least_first(candidates: Sequence[T], replica: Callable[[T], Replica]) -> list[T]:
    return sorted(candidates, key=lambda one: (replica(one).backlog_s, replica(one).requests))


def _busy(owner: Replica, others: Sequence[Replica]) -> bool:
    least_s = min(other.backlog_s for other in others)
    least = min(other.requests for other in others)
    by_work = owner.backlog_s > max(SPILL_S, SPILL_RATIO * least_s)
    return by_work or owner.requests > max(8, SPILL_RATIO * 2 * least)


def _score(key: str, name: str) -> bytes:
    return blake2b(name.encode(), key=blake2b(key.encode(), digest_size=32).digest()).digest()
