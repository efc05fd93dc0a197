"""Jobs on a CPU's cores: together when there are several, all cores for one, in order."""

import threading
import time
from queue import Empty, SimpleQueue

import pytest
import torch

from encode_server.engine.side_by_side import SideBySide


@pytest.fixture
def two():
    threads = SideBySide(2, 2)
    yield threads
    threads.close()


def test_a_job_alone_has_all_cores_and_two_share_them(two):
    cores = SimpleQueue()
    together = threading.Barrier(3)

    def job():
        cores.put(torch.get_num_threads())
        together.wait(10)

    def alone():
        cores.put(torch.get_num_threads())

    two.submit(alone)
    assert cores.get(timeout=10) == 2
    two.submit(job)
    two.submit(job)
    together.wait(10)  # both run concurrently
    assert min(cores.get(timeout=10), cores.get(timeout=10)) == 1


def test_a_small_job_has_the_cores_that_it_is_worth(two):
    cores = SimpleQueue()
    for most in (1, 5, 0):
        two.submit(lambda: cores.put(torch.get_num_threads()), most)
        assert cores.get(timeout=10) == min(2, max(1, most))


def test_jobs_start_in_order_and_no_more_than_there_are_cores(two):
    started, gate = SimpleQueue(), threading.Event()

    def job(number):
        started.put(number)
        gate.wait(10)

    for number in range(6):
        two.submit(lambda number=number: job(number))
    first = {started.get(timeout=10), started.get(timeout=10)}
    assert first == {0, 1}
    with pytest.raises(Empty):
        started.get(timeout=0.2)
    gate.set()
    rest = [started.get(timeout=10) for _ in range(4)]
    assert sorted(rest) == [2, 3, 4, 5]


def test_closing_drops_what_has_not_started():
    threads, started, gate = SideBySide(1, 1), SimpleQueue(), threading.Event()

    def job(number):
        started.put(number)
        gate.wait(10)

    threads.submit(lambda: job(0))
    threads.submit(lambda: job(1))
    assert started.get(timeout=10) == 0
    closing = threading.Thread(target=threads.close)
    closing.start()
    while threads._waiting:
        time.sleep(0.001)
    gate.set()
    closing.join()
    assert started.empty()
