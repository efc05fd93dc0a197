"""The front's benchmark: what it runs and prints, and what it concludes for machines with more cores."""

from __future__ import annotations

import json

import pytest

from benchmarks import front


def slot(what: str, concurrency: int, loop_ms: float, threads_ms: float, preparers_ms: float) -> dict[str, object]:
    cpu = {"loop": loop_ms / 1e3, "threads": threads_ms / 1e3, "preparers": preparers_ms / 1e3, "ranks": 0.0}
    return {"media": what, "concurrency": concurrency, "cpu_s_per_item": cpu}


@pytest.mark.slow
def test_every_medium_goes_through_a_server_without_an_encoder(tmp_path, capsys):
    found = tmp_path / "found.json"
    options = ["--media=56,video,audio", "--processes=1", "--concurrency=1,4", "--seconds=0.4", "--width=512"]
    assert front.main([*options, f"--json={found}"]) == 0
    slots = json.loads(found.read_text())["slots"]
    assert [(slot["media"], slot["concurrency"]) for slot in slots] == [
        (what, concurrency) for what in ("56", "video", "audio") for concurrency in (1, 4)
    ]
    for measured in slots:
        assert measured["outcomes"].keys() == {"200"}
        assert measured["cpu_s_per_item"]["loop"] > 0 and measured["cpu_s_per_item"]["preparers"] > 0
    size = slots[0]["bytes_in"] / slots[0]["requests"]
    assert 4 * 512 * 2 < size < 4 * 512 * 2 + 1000, "56 px are 4 tokens, of 512 values in bfloat16"
    printed = capsys.readouterr().out
    assert "front's loop" in printed and "16 cores" in printed


@pytest.mark.parametrize(
    ("cores", "rate"),
    [
        (8, 6 / 8e-3),  # the preparers are the limit: six cores, 8 ms an item with the front's threads
        (16, 1 / 1e-3),  # the loop is
    ],
)
def test_the_loop_has_one_core_and_the_preparers_the_others(cores, rate):
    slots = [slot("448", 1, 9.0, 9.0, 9.0), slot("448", 8, 1.0, 1.0, 7.0), slot("224", 8, 0.1, 0.1, 0.1)]
    assert front.extrapolated(slots, "448", cores) == pytest.approx(rate)


def test_what_is_wrong_is_said(capsys):
    assert front.main(["--processes=none"]) == 2
    assert "benchmarks.front: " in capsys.readouterr().err
