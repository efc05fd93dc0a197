"""The search for the highest rate that holds an objective, the mix from a file, and the plots."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter

import pytest

from encode_server import cli
from encode_server.bench.goodput import Objective, Step, best, highest_rate
from encode_server.bench.mix import Mix, Share, read_mix
from encode_server.bench.plot import Line, Panel, write_plot
from encode_server.bench.source import mixed, of_kind
from encode_server.errors import StartupError
from tests.bench.standin import Standin

OBJECTIVE = Objective(0.5, 99)


def search(capacity: float, first: float, precision: float = 0.1) -> list[Step]:
    """The search against a server that holds every rate up to `capacity`."""

    async def measure(rate: float) -> Step:
        return Step(rate, due=100, in_time=100 if rate <= capacity else 50)

    return asyncio.run(highest_rate(measure, OBJECTIVE, first, precision))


@pytest.mark.parametrize("capacity", [0.9, 2, 37, 4096, 9000])
@pytest.mark.parametrize("first", [1, 50])
def test_the_search_ends_within_its_precision_of_the_true_rate(capacity, first):
    steps = search(capacity, first)
    found = best(steps, OBJECTIVE)
    assert found is not None and capacity / 1.1 <= found.rate <= capacity
    assert len(steps) <= 24


def test_a_server_that_holds_nothing_is_found_out():
    assert best(search(0.0, 4), OBJECTIVE) is None


def test_a_step_that_was_given_up_held_nothing():
    assert not Step(5, due=30, in_time=30, given_up=True).holds(OBJECTIVE)
    assert not Step(5).holds(OBJECTIVE)
    assert Step(5, due=100, in_time=99).holds(OBJECTIVE) and not Step(5, due=100, in_time=98).holds(OBJECTIVE)


def find(standin: Standin, tmp_path, capsys, *more: str) -> tuple[int, dict, str]:
    """`encode-server bench` against a stand-in that serves on a loop of its own."""
    out = tmp_path / "bench.json"

    async def served() -> int:
        async with standin.running():
            arguments = [
                "bench",
                standin.url,
                "--media",
                "16",
                "--seconds",
                "0.6",
                "--warmup-s",
                "0",
                "--json",
                str(out),
            ]
            return await asyncio.to_thread(cli.main, [*arguments, *more])

    status = asyncio.run(served())
    return status, json.loads(out.read_text()), capsys.readouterr().out


def test_a_server_that_breaks_down_above_a_rate_has_its_goodput_found(tmp_path, capsys):
    standin = Standin()
    standin.answers = lambda number: (200, 0.01) if standin.in_work <= 2 else (429, 0.0)
    plot = tmp_path / "plot.html"
    more = ("--objective-ms", "5000", "--rate", "20", "--precision", "3", "--percentile", "50", "--plot", str(plot))
    status, document, said = find(standin, tmp_path, capsys, *more)
    assert status == 0 and "goodput" in said
    held = [step["rate"] for step in document["steps"] if step["holds"]]
    assert document["goodput"]["rate"] == max(held) and len(held) < len(document["steps"])
    assert document["server"] is None and document["profile"] == [], "the stand-in has no /status"
    assert plot.read_text().count("<polyline") == 3


def test_a_server_that_is_always_late_has_no_goodput(tmp_path, capsys):
    standin = Standin(lambda number: (200, 0.25))
    status, document, said = find(standin, tmp_path, capsys, "--objective-ms", "20", "--rate", "20", "--seconds", "0.2")
    assert status == 1 and document["goodput"] is None and "no rate held" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--precision", "0"), "--precision: got 0, takes a number above zero"),
        (("--precision", "-1"), "--precision: got -1"),
        (("--rate", "-5"), "--rate: got -5, takes requests a second, above zero"),
    ],
)
def test_a_search_that_cannot_end_is_one_sentence(capsys, more, said):
    assert cli.main(["bench", "http://127.0.0.1:1", "--objective-ms", "20", *more]) == 1
    assert said in capsys.readouterr().err


def test_the_search_ends_where_no_number_is_between_held_and_missed():
    assert best(search(37, 1, precision=1e-30), OBJECTIVE).rate == pytest.approx(37)


def test_engines_are_asked_for_a_chat():
    request = next(of_kind("16", 2, chat_model="my model"))
    body = json.loads(b"".join(request.pieces))
    assert request.path == "/v1/chat/completions" and body["model"] == "my model" and body["max_tokens"] == 1
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "image_url", "text"]
    assert parts[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert parts[0] != parts[1], "no cache sees the same twice"


def test_a_mix_is_read_and_drawn_by_its_weights(tmp_path):
    file = tmp_path / "mix.toml"
    file.write_text('repeat = 0.5\n[[request]]\nmedia = "16"\nweight = 3\n[[request]]\nmedia = "32"\nitems = 2\n')
    mix = read_mix(file)
    assert mix == Mix((Share("16", 1, 3), Share("32", 2, 1.0)), 0.5) and mix.items_per_request == 1.25
    drawn = list(itertools.islice(mixed(mix), 800))
    kinds = Counter(request.items for request in drawn)
    assert 450 < kinds[1] < 750
    sent = Counter(b"".join(request.pieces) for request in drawn)
    assert 0.4 < 1 - len(sent) / len(drawn) < 0.6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "takes tables"),
        ('[[request]]\nmedium = "16"', "medium is no field"),
        ('[[request]]\nmedia = "16"\nitems = 0', "items takes a whole number above zero, got 0"),
        ('[[request]]\nmedia = "16"\nweight = "2"', "weight takes a number above zero, without quotes, got '2'"),
        ('[[request]]\nmedia = "16"\nweight = inf', "weight takes a number above zero"),
        ('repeat = 1\n[[request]]\nmedia = "16"', "repeat takes a part"),
        ("[[", "is no TOML"),
    ],
)
def test_a_mix_that_means_nothing_is_one_sentence(tmp_path, text, said):
    file = tmp_path / "mix.toml"
    file.write_text(text)
    with pytest.raises(StartupError, match=said):
        read_mix(file)


def test_a_plot_is_html_or_png(tmp_path):
    panel = Panel("<Latency>", "x", "y", [Line("p50", [(1, 10), (1000, 200)])], (100, "limit"), log=True)
    write_plot(tmp_path / "a.html", "A & B", ["note"], [panel])
    text = (tmp_path / "a.html").read_text()
    assert "&lt;Latency&gt;" in text and "A &amp; B" in text and "http" not in text
    write_plot(tmp_path / "a.png", "A", [], [panel])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(StartupError, match=r"ends in \.html or \.png"):
        write_plot(tmp_path / "a.pdf", "A", [], [panel])
