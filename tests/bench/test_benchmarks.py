"""The benchmarks run through on a tiny tower: what they find and print, never how fast it was."""

from __future__ import annotations

import asyncio
import json
import os
from types import SimpleNamespace

import pytest
import torch

from benchmarks import correctness, gpu, overhead, roofline, serving, small, tables
from benchmarks.prometheus import Look
from benchmarks.towers import FULL_SIZE, TINY, write_checkpoint
from encode_server.bench.load import Load
from encode_server.bench.source import requests
from encode_server.media.limits import MediaLimits
from encode_server.media.unique import jpeg
from encode_server.models.preprocess import Preprocessor
from encode_server.models.resolve import open_directory
from encode_server.wire.modality import Modality
from tests.bench.standin import Standin


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Directories of the tiny towers' checkpoints by name."""
    root = tmp_path_factory.mktemp("towers")
    return {
        name: write_checkpoint(tower, root / tower.model_type, dtype="float32", device="cpu")
        for name, tower in TINY.items()
    }


def counted(concurrency: int, **_: object) -> Load:
    """A load that ends by count: a short window of time can pass without an answer."""
    return Load(concurrency, seconds=60, count=10)


@pytest.mark.slow
def test_serving_measures_everything_for_one_size(towers, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(serving.Plan, "load", lambda self, concurrency, rate: counted(concurrency))
    found, picture = tmp_path / "found.json", tmp_path / "plot.svg"
    options = ["--sizes=84", "--concurrency=1,2", "--seconds=0.3", "--rounds=1", "--device=cpu", "--threads=1"]
    extra = ["--no-naive", "--no-startup", f"--json={found}", f"--plot={picture}"]
    assert serving.main([f"--model={towers['Qwen2.5-VL, tiny']}", *options, *extra]) == 0
    document = json.loads(found.read_text())
    measured = document["loads"]["84"]
    assert len(measured["floors"]) == 3, "before, between and after the loads"
    assert all(floors["transformers"] > 0 and floors["ours"] > 0 for floors in measured["floors"])
    assert [slot["concurrency"] for slot in measured["ours"]] == [1, 2]
    for slot in measured["ours"]:
        assert set(slot["outcomes"]) == {"200"}
        assert slot["tokens"] == slot["items"] * 9, "84 px are 6 patches a side, merged 2 x 2"
        assert slot["over_ours"] > 0
        assert slot["metrics"]["preprocessed_per_item"] == pytest.approx(1, abs=0.2)
        assert slot["cpu_s_per_item"]["ranks"] > 0
        assert slot["cpu_s_per_item"]["loop"] > 0
        stages = slot["stage_cpu_s"]
        assert set(stages) == {"front", "decode", "preprocess", "copy", "messages", "forward"}
        assert all(seconds > 0 for seconds in stages.values())
    assert {"decode_s", "preprocess_s", "forward_s", "total_s"} <= set(measured["ours"][0]["bare"])
    assert picture.read_text().lstrip().startswith("<?xml")
    printed = capsys.readouterr().out
    assert "floor: transformers" in printed and "our floor" in printed and "ours" in printed


@pytest.mark.slow
def test_what_the_engine_adds_to_a_forward(towers, capsys):
    assert overhead.main([f"--model={towers['Qwen2.5-VL, tiny']}", "--batches=5"]) == 0
    assert "over 5 batches" in capsys.readouterr().out


@pytest.mark.slow
def test_the_gpu_script_runs_through_on_a_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "Load", counted)
    # In this process: another one would import torch again.
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **_: roofline.main(command[3:]))
    threads = torch.get_num_threads()
    found = tmp_path / "found.json"
    assert gpu.main(["--device=cpu", "--tiny", f"--json={found}"]) == 0
    torch.set_num_threads(threads)
    document = json.loads(found.read_text())
    assert all(check["ok"] for check in document["correctness"])
    assert any("2 rank(s) over gloo" in check["name"] for check in document["correctness"])
    (tower,) = document["towers"].values()
    assert set(tower["floors"]) == set(tower["predicted"]) == {"56", "112"}
    assert all(row["card"] == "H100" and 0 < row["share"] < 1 for row in tower["predicted"].values())
    assert tower["service"]["112"]["outcomes"].keys() == {"200"}
    assert "the service over loopback HTTP" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(capsys):
    assert gpu.main([]) == 0
    assert "no GPU here: nothing was run" in capsys.readouterr().out


@pytest.mark.parametrize("name", TINY)
def test_a_wrong_embedding_would_be_noticed(towers, name):
    path = towers[name]
    pictures = [jpeg(84, 56, seed).copy() for seed in range(2)]
    preprocessor = Preprocessor(open_directory(path), MediaLimits())
    items = [dict(preprocessor.prepare(Modality.IMAGE, picture).tensors) for picture in pictures]
    expected = correctness.plain(path, pictures, "cpu", "float32")
    found = correctness.ours(path, items, "cpu", "float32")
    assert correctness.relative_error(found, expected) < correctness.FLOAT32
    assert correctness.relative_error(found[::-1], expected) > correctness.BFLOAT16
    assert correctness.relative_error([part[1:] for part in found], expected) == float("inf")
    nothing = [part * float("nan") for part in found]
    assert not correctness.Check("", correctness.relative_error(nothing, expected), 1.0).ok


@pytest.mark.parametrize(
    ("name", "side", "patches", "tflop"),
    [
        ("Qwen2.5-VL-7B", 448, 1024, 1.35),
        ("Qwen2.5-VL-7B", 1792, 16384, 26.8),
        ("Qwen3-VL-8B", 448, 784, 0.79),
        ("Qwen3-VL-8B", 1792, 12544, 31.0),
    ],
)
def test_the_work_of_a_forward(name, side, patches, tflop):
    tower = FULL_SIZE[name]
    assert tower.patches(side) == patches
    assert tower.tflop(side) == pytest.approx(tflop, rel=0.02)


def test_metrics_are_read_as_differences():
    text = """# TYPE lag histogram
lag_bucket{le="1"} %d
lag_bucket{le="2"} %d
lag_bucket{le="+Inf"} %d
# TYPE items counter
items_total{modality="image"} %d
items_total{modality="audio"} 7
"""
    happened = Look.parse(text % (100, 100, 100, 30)).since(Look.parse(text % (50, 0, 0, 10)))
    assert happened.total("items_total") == 20
    assert happened.total("items_total", modality="audio") == 0
    assert happened.labels("items_total", "modality") == ["audio", "image"]
    assert happened.quantile("lag", 0.25) == pytest.approx(0.5)
    assert Look.parse(text % (0, 0, 0, 0)).quantile("lag", 0.99) == 0


def test_memory_is_looked_at_all_along():
    async def run():
        async with Standin().running() as standin:
            server = SimpleNamespace(url=standin.url, process=SimpleNamespace(pid=os.getpid()))
            return await asyncio.to_thread(small.memory, server, requests(["16"]), 100)

    found = asyncio.run(run())
    assert len(found["looks"]) == small.LOOKS
    assert found["looks"][-1][0] == found["requests"] == 100
    assert min(found["before"], found["half"], found["after"]) > 1e6
    assert tables.rest({"memory": found}).startswith("front's memory over 100 requests")


@pytest.mark.parametrize("options", [["--also=gif"], ["--sizes=big"], ["--concurrency=0"]])
def test_serving_says_what_is_wrong(options, capsys):
    assert serving.main(options) == 2
    assert "benchmarks.serving: " in capsys.readouterr().err
