"""A real SGLang 0.5.23 with its own encoder, then with ours: the same checkpoint gives the same answers.

`uv run pytest -m interop -s` makes the virtual environment (8 GB) on first use, in SGLANG_VENV or the user's cache, and
takes some ten minutes on two cores. It prints the table of docs/sglang.md.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from encode_server.media import samples as demo_media
from tests.interop.engines import HERE, Engine, Prefill, image, our_encoder, sglang_encoder, video
from tests.media.samples import image_bytes, picture

pytestmark = [pytest.mark.interop, pytest.mark.timeout(3600)]

TOLERANCE = 1e-3


def png(seed: int, width: int = 112, height: int = 112) -> bytes:
    return image_bytes("PNG", picture(width, height, seed))


QUESTIONS = {
    "one image": [image(png(7))],
    "three images": [image(png(1)), image(png(2, 168, 112)), image(png(3, 84, 224))],
    "video": [video(demo_media.clip())],
    "image and video": [image(png(4, 140, 84)), video(demo_media.clip())],
}


@dataclass(frozen=True)
class Answer:
    prompt_tokens: int
    logprobs: list[float]


def ask_all(prefill: Prefill) -> dict[str, Answer]:
    answers = {}
    for name, media in QUESTIONS.items():
        response = prefill.ask(*media)
        assert response.status_code == 200, f"{name}: {response.text}\n{prefill.log.read_text()[-3000:]}"
        document = response.json()
        logprobs = [token["logprob"] for token in document["choices"][0]["logprobs"]["content"]]
        answers[name] = Answer(document["usage"]["prompt_tokens"], logprobs)
    return answers


class Bench:
    """Starts what a test wants, one prefill at a time: an idle scheduler keeps a core busy."""

    def __init__(self, checkpoint: Path, logs: Path) -> None:
        self._checkpoint, self._logs, self._count = checkpoint, logs, 0
        self.answers: dict[str, dict[str, Answer]] = {}

    def _log(self, name: str) -> Path:
        self._count += 1
        return self._logs / f"{self._count}-{name}.log"

    def prefill(self, **options) -> Prefill:
        return Prefill(self._checkpoint, self._log("prefill"), **options)

    def own(self, prefill: Prefill, backend: str = "zmq_to_scheduler") -> Engine:
        return sglang_encoder(self._checkpoint, self._log("own"), prefill.bootstrap, backend)

    def ours(self, prefill: Prefill, *options: str) -> Engine:
        return our_encoder(self._checkpoint, self._log("ours"), prefill.bootstrap, "--video-fps", "2", *options)


@pytest.fixture(scope="module")
def empty_bench(tmp_path_factory) -> Bench:
    directory = tmp_path_factory.mktemp("interop")
    subprocess.run([sys.executable, str(HERE / "make_checkpoint.py"), str(directory / "checkpoint")], check=True)
    return Bench(directory / "checkpoint", directory)


@pytest.fixture(scope="module")
def bench(empty_bench) -> Iterator[Bench]:
    """With the answers of one prefill to its own encoder, to one of ours and to two of ours."""
    bench = empty_bench
    with bench.prefill() as prefill:
        prefill.answering("/health")
        with bench.own(prefill) as own:
            own.answering("/health")
            prefill.with_encoders(1)
            bench.answers["its own encoder"] = ask_all(prefill)
        httpx.request("DELETE", prefill.bootstrap + "/unregister_encoder_url", json={"url": own.url})
        prefill.with_encoders(0)
        with ExitStack() as stack:
            stack.enter_context(bench.ours(prefill))
            prefill.with_encoders(1)
            bench.answers["ours"] = ask_all(prefill)
            stack.enter_context(bench.ours(prefill))
            prefill.with_encoders(2)
            bench.answers["two of ours"] = ask_all(prefill)
        assert prefill.encoders() == []  # they took their leave
    yield bench
    report(bench.answers)


def difference(bench: Bench, one: str, question: str) -> float:
    expected, got = bench.answers["its own encoder"][question], bench.answers[one][question]
    assert got.prompt_tokens == expected.prompt_tokens
    return max(abs(a - b) for a, b in zip(expected.logprobs, got.logprobs, strict=True))


@pytest.mark.parametrize("encoders", ["ours", "two of ours"])
@pytest.mark.parametrize("question", ["one image", "three images"])
def test_the_same_answers(bench, encoders, question):
    assert difference(bench, encoders, question) < TOLERANCE


@pytest.mark.parametrize("encoders", ["ours", "two of ours"])
@pytest.mark.parametrize("question", ["video", "image and video"])
def test_video_makes_as_many_tokens(bench, encoders, question):
    """Which frames are taken differs by a fraction of a second; see docs/sglang.md."""
    assert difference(bench, encoders, question) < 0.5


def test_a_prefill_of_two_ranks(bench):
    with bench.prefill(tp=2) as prefill:
        prefill.answering("/health")
        with bench.ours(prefill):
            prefill.with_encoders(1)
            bench.answers["ours, prefill tp 2"] = ask_all(prefill)
    for question in ("one image", "three images"):
        assert difference(bench, "ours, prefill tp 2", question) < TOLERANCE


def test_to_the_tokenizer(bench):
    with bench.prefill(backend="zmq_to_tokenizer") as prefill:
        prefill.answering("/health")
        with bench.ours(prefill):
            prefill.with_encoders(1)
            bench.answers["ours, zmq_to_tokenizer"] = ask_all(prefill)
            bad = prefill.ask(image(b"no picture"))
            assert bad.status_code >= 400
            assert ask_all(prefill)["one image"].prompt_tokens == 64  # and it goes on
    for question in ("one image", "three images"):
        assert difference(bench, "ours, zmq_to_tokenizer", question) < TOLERANCE


def test_a_full_encoder_that_loses_a_rank_lets_the_prefill_wait(empty_bench):
    """A refusal would end this prefill: 200 chats wait at the door of an encoder with four places, and while a rank is
    killed and comes back."""
    with empty_bench.prefill() as prefill:
        prefill.answering("/health")
        with empty_bench.ours(prefill, "--max-requests", "4", "--cache-gb", "0") as ours:
            prefill.with_encoders(1)
            with ThreadPoolExecutor(200) as pool:
                chats = [pool.submit(prefill.ask, image(png(seed, 56, 56))) for seed in range(200)]
                while sum(chat.done() for chat in chats) < 20:
                    assert prefill.process.poll() is None, prefill.log.read_text()[-3000:]
                    time.sleep(0.05)
                os.kill(process_named("rank 0", ours.process.pid), signal.SIGKILL)
                answers = [chat.result().status_code for chat in chats]
            assert answers == [200] * 200
            assert "ranks lost" in ours.log.read_text()
        assert prefill.process.poll() is None


def process_named(name: str, ancestor: int) -> int:
    """The process below `ancestor` that `ps` shows under this name."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "comm").read_text().strip() == name:
            parent = int(entry.name)
            while parent > 1:
                parent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
                if parent == ancestor:
                    return int(entry.name)
    raise AssertionError(f"no process called {name!r}")


def report(answers: dict[str, dict[str, Answer]]) -> None:
    expected = answers["its own encoder"]
    print("\n| encoder | " + " | ".join(QUESTIONS) + " |\n|" + " --- |" * (len(QUESTIONS) + 1))
    for encoder, by_question in answers.items():
        cells = []
        for question, answer in by_question.items():
            gap = max(abs(a - b) for a, b in zip(expected[question].logprobs, answer.logprobs, strict=True))
            cells.append(f"{answer.prompt_tokens} tokens, {answer.logprobs[0]:.4f} …, {gap:.1e}")
        print(f"| {encoder} | " + " | ".join(cells) + " |")
