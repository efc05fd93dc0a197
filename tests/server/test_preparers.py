"""Decoders that crash, hang or take all memory, and preparers that are killed: nobody else notices."""

import asyncio
import os
import signal

import pytest

from encode_server.client import EncodeServerError
from tests.live import eventually
from tests.server.faults import Load, all_equal, encode_all, start

CRASH, HANG = b"crash the decoder", b"hang the decoder"  # see benchmarks/faults
SPIN, MEMORY = b"spin the decoder", b"fill the memory"


@pytest.fixture(scope="module")
def faulty(checkpoint, tmp_path_factory):
    options = ("--preproc-processes", "2", "--preproc-memory-mb", "1024")
    with start(checkpoint, tmp_path_factory.mktemp("faulty"), *options) as server:
        yield server.healthy()


def refusal(faulty, reference, picture, mark: bytes) -> EncodeServerError:
    """How the one marked image among 24 ends; the others must be encoded."""
    media = [picture(140, 140, seed) for seed in range(24)]
    results = asyncio.run(encode_all(faulty, [*media[:12], picture(56, 56, 99) + mark, *media[12:]]))
    marked = results.pop(12)
    assert all_equal(results, reference, media)
    assert isinstance(marked, EncodeServerError)
    return marked


def test_a_decoder_that_crashes_is_the_items_error_and_nobody_elses(faulty, reference, picture):
    error = refusal(faulty, reference, picture, CRASH)
    assert (error.status, error.code) == (400, "bad_media") and "its decoder crashed" in error.message
    assert eventually(lambda: len(faulty.preparer_pids()) == 2)


def test_a_preparer_killed_under_load_costs_nothing(faulty, reference, picture):
    media = [picture(280, 280, seed) for seed in range(8)]

    async def scenario():
        async with Load(faulty, media) as load:
            for index in (0, 1):
                await load.progress(8)
                os.kill(faulty.preparer_pids()[index % len(faulty.preparer_pids())], signal.SIGKILL)
            await load.progress(16)
        assert load.right(reference)

    asyncio.run(scenario())
    assert faulty.process.poll() is None


@pytest.mark.slow
def test_a_decoder_that_waits_for_ever_is_the_items_error(faulty, reference, picture):
    error = refusal(faulty, reference, picture, HANG)
    assert error.status == 400 and "its decoder hangs" in error.message


@pytest.mark.slow
def test_a_decoder_that_computes_for_ever_is_the_items_error(checkpoint, tmp_path, reference, picture):
    with start(checkpoint, tmp_path / "s", "--decode-s", "4") as server:
        error = refusal(server.healthy(), reference, picture, SPIN)
    assert error.status == 413 and "takes longer than 4 s" in error.message


@pytest.mark.slow
def test_a_decoder_that_takes_all_memory_is_the_items_error(faulty, reference, picture):
    error = refusal(faulty, reference, picture, MEMORY)
    assert error.status in (400, 413, 500)
    assert faulty.process.poll() is None


@pytest.mark.slow
def test_a_forkserver_killed_under_load_costs_a_delay(faulty, reference, picture):
    media = [picture(280, 280, seed) for seed in range(8)]

    async def scenario():
        async with Load(faulty, media) as load:
            for _ in range(2):
                await load.progress(8)
                os.kill(faulty.forkserver_pid(), signal.SIGKILL)
            await load.progress(16)
        assert load.right(reference)

    asyncio.run(scenario())
    faulty.healthy()


@pytest.mark.slow
def test_many_that_crash_their_decoders_do_not_end_the_server(faulty, reference, picture):
    media = [picture(56, 56, seed) for seed in range(6)]
    marked = [picture(56, 56, seed) + CRASH for seed in range(10)]
    results = asyncio.run(encode_all(faulty, [*marked, *media]))
    assert {result.code for result in results[:10]} == {"bad_media"}
    assert all_equal(results[10:], reference, media)
