"""Refusals say when to come again; one client cannot take every place; everything is given back."""

import pytest

from encode_server.errors import TooBusy, TooLarge
from encode_server.pipeline.admission import Admission, AdmissionLimits


def admission(requests=10, nbytes=1000, tokens=1000, share=0.5):
    return Admission(AdmissionLimits(requests, nbytes, tokens, share))


def enter(admission, client="a", nbytes=0):
    context = admission.admit(client, nbytes)
    context.__enter__()
    return context


def leave(context):
    context.__exit__(None, None, None)


def test_places_are_bounded_and_come_back():
    gate = admission(requests=3, share=1)
    held = [enter(gate) for _ in range(3)]
    with pytest.raises(TooBusy) as refused:
        enter(gate)
    assert refused.value.bound == "requests"
    assert 1 <= int(refused.value.headers["Retry-After"]) <= 60
    leave(held.pop())
    leave(enter(gate))
    assert gate.held.requests == 2


def test_a_client_has_all_places_alone_and_its_share_beside_others():
    gate = admission()
    held = [enter(gate, "greedy") for _ in range(9)]
    other = enter(gate, "modest")
    leave(held.pop())
    with pytest.raises(TooBusy, match="share") as refused:
        enter(gate, "greedy")
    assert refused.value.bound == "client_share"
    leave(enter(gate, "modest"))
    leave(other)
    leave(enter(gate, "greedy"))  # alone again


def test_a_body_too_many_is_refused_before_it_is_read():
    gate = admission()
    with gate.admit("a", 600):
        with pytest.raises(TooBusy, match="media") as refused:
            enter(gate, "b", 600)
        assert refused.value.bound == "bytes"
        leave(enter(gate, "b", 300))
    assert gate.held.bytes == 0
    leave(enter(gate, "b", 5000))  # larger than the bound, but nothing else is there: it may try


def test_a_share_is_of_bytes_and_of_tokens_too():
    gate = admission(nbytes=1000, tokens=1000)
    with gate.admit("greedy", 400):
        leave(enter(gate, "greedy", 400))  # alone
        with gate.admit("modest", 10) as modest:
            with pytest.raises(TooBusy, match="MiB of media in progress, its full share"):
                enter(gate, "greedy", 400)
            leave(enter(gate, "greedy", 50))
            modest.weigh(tokens=600)
            with pytest.raises(TooBusy, match="tokens in progress, its full share"):
                enter(gate, "modest")
            leave(enter(gate, "greedy"))


def test_tokens_in_work_are_bounded():
    gate = admission()
    with gate.admit("a", 0) as ticket:
        ticket.weigh(tokens=1500)
        with pytest.raises(TooBusy, match="tokens"):
            enter(gate, "b")
    assert gate.held.tokens == 0
    leave(enter(gate, "b"))


def test_retry_after_grows_with_what_is_in_work():
    def retry_after(waiting):
        gate = admission(requests=waiting, share=1)
        for _ in range(50):  # a drain rate to measure
            leave(enter(gate))
        held = [enter(gate) for _ in range(waiting)]
        with pytest.raises(TooBusy) as refused:
            enter(gate)
        assert len(held) == waiting
        return int(refused.value.headers["Retry-After"])

    assert retry_after(20) < retry_after(400) <= 60


def test_a_client_that_fills_the_server_gives_way_to_one_that_was_refused():
    gate = admission(requests=4, share=0.5)
    held = [enter(gate, "greedy") for _ in range(4)]
    with pytest.raises(TooBusy, match="in progress"):
        enter(gate, "patient")
    leave(held.pop())
    with pytest.raises(TooBusy, match="share"):
        enter(gate, "greedy")
    leave(enter(gate, "patient"))


def test_what_is_fetched_is_bounded_too():
    gate = admission(nbytes=1000)
    with gate.admit("a", 10) as first, gate.admit("b", 10) as second:
        first.weigh(nbytes=700)
        with pytest.raises(TooBusy, match="media"):
            second.weigh(nbytes=700)
        with pytest.raises(TooLarge):
            first.weigh(nbytes=700)
        assert gate.held.bytes == 720
    assert gate.held.bytes == 0
