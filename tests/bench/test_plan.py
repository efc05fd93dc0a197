"""The simulation of one server, and what is planned from it."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace

import pytest

from encode_server import cli
from encode_server.bench.goodput import Objective
from encode_server.bench.simulation import Kind, Machine, simulate
from encode_server.bench.virtual import simulated
from encode_server.wire.modality import Modality

IMAGE = Kind(Modality.IMAGE, 1024, 1, 1.0, front_s=0.0005, prepare_s=0.004, copy_s=0.0, forward_s=0.001)
GPU = Machine(16, 8, 2, 1, None, dict.fromkeys(Modality, 16384), dict.fromkeys(Modality, 0.0025), on_cores=False)
CPU = replace(GPU, cores=2, computing=2, on_cores=True)
OBJECTIVE = Objective(0.2, 99)


def at(rate: float, kind: Kind = IMAGE, machine: Machine = GPU, seconds: float = 2.0):
    return simulate([kind], machine, rate, seconds, OBJECTIVE)


def half(step) -> float:
    return sorted(step.latencies)[len(step.latencies) // 2]


def test_virtual_time_passes_without_waiting():
    async def sleep() -> float:
        await asyncio.gather(*(asyncio.sleep(hours * 3600) for hours in range(5)))
        return asyncio.get_running_loop().time()

    began = time.perf_counter()
    assert simulated(sleep()) == pytest.approx(4 * 3600)
    assert time.perf_counter() - began < 30


def test_what_never_happens_is_an_error_and_not_a_hang():
    with pytest.raises(RuntimeError, match="never happens"):
        simulated(asyncio.Event().wait())


def test_a_request_alone_takes_the_sum_of_its_stages():
    assert half(at(0.5, seconds=40)) == pytest.approx(0.0005 + 0.004 + 0.0025 + 0.001, abs=1e-4)


def test_batches_fill_under_load_so_that_the_fixed_cost_is_shared():
    # One item alone costs 3.5 ms, one forward at a time: 285 a second. In batches of up to 16 items, 18.5 ms: 864.
    step = at(600)
    assert step.holds(OBJECTIVE) and half(step) < 0.1
    assert not at(1000).holds(OBJECTIVE), "the second batch in progress waits for the first"
    assert not at(600, machine=replace(GPU, batch_cost=1024)).holds(OBJECTIVE), "batches of one item"


def test_preparers_and_the_front_are_bounds_too():
    assert not at(600, machine=replace(GPU, threads=2)).holds(OBJECTIVE), "two threads prepare 500 a second"
    assert not at(600, kind=replace(IMAGE, front_s=0.002)).holds(OBJECTIVE), "the front does 500 a second"
    cached = replace(GPU, threads=2, hit_rate=0.5)
    assert at(600, machine=cached).holds(OBJECTIVE), "half of them are cached"


def test_on_a_cpu_forwards_take_cores():
    assert at(120, machine=CPU).holds(OBJECTIVE)
    assert not at(400, machine=CPU).holds(OBJECTIVE)


def test_groups_of_ranks_share_the_load():
    assert at(1000, machine=replace(GPU, groups=2), seconds=1).holds(OBJECTIVE), "one group does 864 a second"


@pytest.fixture
def bench(tmp_path):
    document = {
        "mix": {"repeat": 0.0, "request": [{"media": "448"}]},
        "objective": {"seconds": 1.0, "percent": 90},
        "profile": [
            {
                "media": "448",
                "modality": "image",
                "patches": 1024,
                "tokens": 256,
                "bytes": 60_000,
                "answer_bytes": 400_000,
                "stages_s": {"fetch": 0, "preprocess": 0.04, "copy": 0, "queue": 0, "forward": 0.07},
                "total_s": 0.115,
            }
        ],
        "server": {
            "device": "cuda:0",
            "capacity": {
                "cores": 16,
                "tp": 2,
                "dp": 1,
                "preparer_threads": 8,
                "at_once": 2,
                "computing": 2,
                "batch_cost": None,
                "budgets": {"image": 16384},
                "costs": {"image": [0.05, 2e-5, 0.0]},
            },
        },
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(document))
    return path


def test_a_plan_says_what_a_load_takes(bench, tmp_path, capsys):
    out, plot = tmp_path / "plan.json", tmp_path / "plan.html"
    arguments = ["plan", str(bench), "--rate", "300", "--seconds", "4", "--json", str(out), "--plot", str(plot)]
    assert cli.main(arguments) == 0
    plan = json.loads(out.read_text())
    assert 50 < plan["requests_per_s_of_a_server"] < 110
    assert (
        plan["servers"] == -(-300 // (0.8 * plan["requests_per_s_of_a_server"]))
        and plan["ranks"] == 2 * plan["servers"]
    )
    assert plan["in_time"] >= 0.9 and plan["latency_s"]["p50"] < 1
    assert plan["preparing_cores_of_a_server"] == pytest.approx(300 / plan["servers"] * 0.04)
    assert plot.read_text().count("<svg") == 3 and "servers" in capsys.readouterr().out


def test_a_plan_counts_the_ranks_of_all_groups(bench, tmp_path):
    document = json.loads(bench.read_text())
    document["server"]["capacity"]["dp"] = 2
    bench.write_text(json.dumps(document))
    out = tmp_path / "plan.json"
    assert cli.main(["plan", str(bench), "--rate", "300", "--seconds", "1", "--json", str(out)]) == 0
    plan = json.loads(out.read_text())
    assert plan["ranks"] == 4 * plan["servers"] and plan["requests_per_s_of_a_server"] > 110, "one group holds less"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--rate", "0"], "--rate takes a number above 0"),
        (["--rate", "5", "--hit-rate", "1"], "--hit-rate"),
        (["--rate", "5", "--mix", "{mix}"], "has not measured '224', only 448"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(bench, tmp_path, capsys, more, said):
    mix = tmp_path / "mix.toml"
    mix.write_text('[[request]]\nmedia = "224"\n')
    assert cli.main(["plan", str(bench), *(part.format(mix=mix) for part in more)]) == 1
    assert said in capsys.readouterr().err


def test_a_bench_without_costs_is_refused(bench, capsys):
    document = json.loads(bench.read_text())
    bench.write_text(json.dumps(document | {"server": None}))
    assert cli.main(["plan", str(bench), "--rate", "5"]) == 1
    assert "has no costs" in capsys.readouterr().err
