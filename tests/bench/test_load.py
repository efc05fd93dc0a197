"""The load generator against a stand-in: what it sends, counts and reports."""

from __future__ import annotations

import asyncio
import json

import pytest

from encode_server import cli
from encode_server.bench.client import LoadClient, Response
from encode_server.bench.load import Load, run_load
from encode_server.bench.report import LoadReport, Result, percentile
from encode_server.bench.source import requests
from encode_server.errors import StartupError
from tests.bench.standin import Standin


def load(standin, how, *, keep_body=False, timeout_s=5.0, on_result=None, on_progress=None):
    async def run():
        async with standin.running():
            client = LoadClient(standin.url, keep_body=keep_body, timeout_s=timeout_s)
            try:
                return await run_load(client, requests(["16"]), how, on_result=on_result, on_progress=on_progress)
            finally:
                client.close()

    return asyncio.run(run())


def test_a_closed_loop_keeps_so_many_in_work_and_counts_them():
    standin = Standin(lambda _: (200, 0.01))
    report = load(standin, Load(concurrency=3, seconds=30, count=20))
    assert standin.most_in_work == 3
    assert standin.connections == 3
    assert report.requests == report.items == 20 == report.outcomes[200]
    assert report.tokens == 20 * 4
    assert report.latency_s(50) >= 0.01
    assert report.failed == 0


def test_every_request_is_unique_and_as_the_api_wants_it():
    standin = Standin()
    load(standin, Load(seconds=30, count=10))
    assert len(set(standin.bodies)) == 10
    document = json.loads(standin.bodies[0])
    assert document["modality"] == "image"
    assert document["mm_items"][0].startswith("data:image/jpeg;base64,")


def test_errors_are_counted_by_status_and_reason():
    outcomes = [200, 429, 0, 200]
    results = []
    report = load(Standin(lambda number: (outcomes[number], 0)), Load(seconds=30, count=4), on_result=results.append)
    assert report.outcomes == {200: 2, 429: 1, 0: 1}
    assert report.failed == 2
    assert any("overloaded" in reason for reason in report.errors)
    assert any("closed by the server" in reason for reason in report.errors)
    assert [result.response.status for result in results] == outcomes
    assert len(report.latencies["image 16x16"]) == 2


def test_a_server_that_does_not_answer_in_time():
    report = load(Standin(lambda _: (200, 30)), Load(seconds=30, count=2), timeout_s=0.05)
    assert report.outcomes == {0: 2}
    assert "timed out in the client" in report.errors


def test_nobody_listens():
    async def run():
        client = LoadClient("http://127.0.0.1:9")
        return await run_load(client, requests(["16"]), Load(seconds=30, count=2))

    report = asyncio.run(run())
    assert report.outcomes == {0: 2}
    assert "no connection" in next(iter(report.errors))


def test_bodies_are_kept_for_those_who_check_them():
    whole, first = [], []
    big = (2000, 64)
    load(Standin(shape=big), Load(seconds=30, count=2), keep_body=True, on_result=whole.append)
    load(Standin(shape=big), Load(seconds=30, count=2), on_result=first.append)
    assert {len(result.response.body) for result in whole} == {whole[0].response.size}
    assert whole[0].response.size > 2000 * 64 * 4
    assert len(first[0].response.body) < first[0].response.size == whole[0].response.size
    assert first[0].response.shape == whole[0].response.shape == big


def test_an_open_loop_does_not_wait_for_answers():
    standin = Standin(lambda _: (200, 0.3))
    report = load(standin, Load(rate=100, seconds=30, count=40))
    assert standin.most_in_work > 5
    assert report.requests == 40 == len(standin.bodies)


def test_an_open_loop_counts_the_time_a_request_waited_for_its_turn():
    report = load(Standin(lambda _: (200, 0.1)), Load(rate=100, seconds=30, count=10, most=1))
    assert report.latency_s(99) > 0.3


def test_a_warm_up_is_not_counted():
    report = load(Standin(lambda number: (200, (0, 1.2)[number])), Load(seconds=30, warmup_s=1.0, count=2))
    assert (report.skipped, report.requests) == (1, 1)


def test_progress_is_told():
    told = []
    standin = Standin(lambda _: (200, 0.1))
    load(standin, Load(seconds=30, count=10), on_progress=lambda done, report: told.append((done, report.requests)))
    assert told == sorted(told)
    assert 0 <= told[0][0] < told[-1][0] <= 1


@pytest.mark.parametrize("how", [{"concurrency": 0}, {"seconds": 0}, {"rate": 0}])
def test_impossible_loads(how):
    with pytest.raises(StartupError):
        Load(**how)


def test_answers_that_come_in_bursts_are_counted_by_whole_bursts():
    """Five batches of eight, one a second, seen from the middle of one to just before the next."""
    report = LoadReport(seconds=4.9)
    request = next(requests(["16"]))
    for second in range(5):
        for place in range(4 if second == 0 else 8):
            result = Result(request, Response(200, 0, b"", {}), 1.0)
            report.add(result, second + place / 1000)
    assert report.items_per_s == pytest.approx(8, rel=0.01)


def test_percentiles():
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (0, 50, 99, 100)] == [1, 50, 99, 100]
    assert percentile([], 50) == 0


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    async def run():
        async with Standin(lambda number: (200 if number % 2 else 503, 0.001)).running() as standin:
            options = ["--media", "16,audio", "--concurrency", "1,2", "--seconds", "1", "--warmup-s", "0"]
            return await asyncio.to_thread(
                cli.main, ["bench", standin.url, *options, "--json", str(tmp_path / "report.json")]
            )

    assert asyncio.run(run()) == 1, "failed requests must show in the exit status"
    document = json.loads((tmp_path / "report.json").read_text())
    assert list(document) == ["at 1", "at 2"]
    assert set(document["at 2"]["outcomes"]) == {"200", "503"}
    assert set(document["at 2"]["latency_s_by_kind"]) == {"image 16x16", "sound"}
    printed = capsys.readouterr().out
    assert "at 1" in printed and "overloaded" in printed


@pytest.mark.parametrize("options", [["--concurrency", "0"], ["--media", "gif"], ["--seconds", "0"]])
def test_the_command_says_what_is_wrong(options, capsys):
    assert cli.main(["bench", "http://127.0.0.1:9", *options]) == 1
    assert capsys.readouterr().err.startswith("encode-server: ")
