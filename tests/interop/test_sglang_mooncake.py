"""A real SGLang 0.5.23 with `--encoder-transfer-backend mooncake`: embeddings are written into the prefill's memory.

By Mooncake over TCP, its wheel without CUDA in both environments. Some ten minutes on two cores.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from encode_server.media import samples as demo_media
from tests.interop.engines import HERE, Engine, Prefill, image, our_encoder, sglang_encoder, video
from tests.interop.test_sglang import TOLERANCE, Answer, png
from tests.live import eventually

pytestmark = [pytest.mark.interop, pytest.mark.timeout(3600)]
pytest.importorskip("mooncake.engine", reason="Mooncake is not installed")

QUESTIONS = {
    "one image": [image(png(7))],
    "three images": [image(png(1)), image(png(2, 168, 112)), image(png(3, 84, 224))],
    "video": [video(demo_media.clip())],
}


def ask_all(prefill: Prefill) -> dict[str, Answer]:
    answers = {}
    for name, media in QUESTIONS.items():
        response = prefill.ask(*media)
        assert response.status_code == 200, f"{name}: {response.text}\n{prefill.log.read_text()[-3000:]}"
        document = response.json()
        logprobs = [token["logprob"] for token in document["choices"][0]["logprobs"]["content"]]
        answers[name] = Answer(document["usage"]["prompt_tokens"], logprobs)
    return answers


class Gate:
    """Stands before an encoder, and calls `on_send` when a prefill says where the embedding goes."""

    def __init__(self, on_send: Callable[[], None]) -> None:
        self.target = ""
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._pass()

            def do_POST(self) -> None:
                if self.path == "/send":
                    on_send()
                self._pass()

            def _pass(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                kind = {"Content-Type": self.headers.get("Content-Type", "application/json")}
                try:
                    answer = httpx.request(
                        self.command, gate.target + self.path, content=body, headers=kind, timeout=300
                    )
                except httpx.TransportError:
                    self.close_connection = True
                    return
                self.send_response(answer.status_code)
                self.send_header("Content-Type", answer.headers.get("Content-Type", "application/json"))
                self.send_header("Content-Length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Bench:
    def __init__(self, directory: Path) -> None:
        self._directory, self._count = directory, 0
        self._checkpoint = directory / "checkpoint"
        subprocess.run([sys.executable, str(HERE / "make_checkpoint.py"), str(self._checkpoint)], check=True)

    def _log(self, name: str) -> Path:
        self._count += 1
        return self._directory / f"{self._count}-{name}.log"

    def prefill(self, **options) -> Prefill:
        return Prefill(self._checkpoint, self._log("prefill"), backend="mooncake", **options)

    def own(self, prefill: Prefill) -> Engine:
        return sglang_encoder(self._checkpoint, self._log("own"), prefill.bootstrap, "mooncake")

    def ours(self, prefill: Prefill, *options: str) -> Engine:
        given = ("--mooncake-host", "127.0.0.1", "--video-fps", "2", *options)
        return our_encoder(self._checkpoint, self._log("ours"), prefill.bootstrap, *given)


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("mooncake"))


def assert_nothing_is_held(encoder: Engine) -> None:
    names = ("encode_requests_in_progress", "encode_registrations", "encode_undelivered_bytes", "encode_inflight_bytes")

    def free() -> bool:
        text = httpx.get(encoder.url + "/metrics", timeout=30).text
        return all(f"\n{name} 0.0" in text for name in names)

    assert eventually(free, 90), httpx.get(encoder.url + "/metrics").text


def difference(expected: Answer, got: Answer) -> float:
    assert got.prompt_tokens == expected.prompt_tokens
    return max(abs(a - b) for a, b in zip(expected.logprobs, got.logprobs, strict=True))


@pytest.mark.parametrize("tp", [1, 2])
def test_the_same_answers_as_by_its_own_encoder(bench, tp):
    with bench.prefill(tp=tp) as prefill:
        prefill.answering("/health")
        with bench.own(prefill) as own:
            own.answering("/health")
            prefill.with_encoders(1)
            expected = ask_all(prefill)
        httpx.request("DELETE", prefill.bootstrap + "/unregister_encoder_url", json={"url": own.url})
        prefill.with_encoders(0)
        before = prefill.log.read_text().count("RDMA transfers completed")
        with bench.ours(prefill) as ours:
            prefill.with_encoders(1)
            got = ask_all(prefill)
            transfers = prefill.log.read_text().count("RDMA transfers completed") - before
            assert transfers == tp * len(QUESTIONS), "each rank receives each part once"
            assert_nothing_is_held(ours)
    for name, answer in got.items():
        gap = difference(expected[name], answer)
        print(f"| tp {tp}, {name} | {answer.prompt_tokens} tokens, {answer.logprobs[0]:.4f} …, {gap:.1e} |")
        assert gap < (0.5 if name == "video" else TOLERANCE)


class Killer:
    """Kills an engine and all that is its own, once."""

    def __init__(self) -> None:
        self.victims: list[Engine] = []

    def __call__(self) -> None:
        while self.victims:
            os.killpg(self.victims.pop().process.pid, signal.SIGKILL)


def test_a_prefill_that_is_killed_before_the_transfer_leaves_nothing(bench):
    kill = Killer()
    with bench.prefill() as prefill, Gate(kill) as gate:
        prefill.answering("/health")
        with bench.ours(prefill, "--advertise-port", str(gate.port)) as ours:
            gate.target = ours.url
            prefill.with_encoders(1)
            kill.victims.append(prefill)
            with pytest.raises(httpx.TransportError):
                prefill.ask(image(png(12)))
            assert not kill.victims
            assert_nothing_is_held(ours)


def test_an_encoder_that_is_killed_before_the_transfer_is_an_error_and_no_hang(bench):
    """Whether the prefill survives is SGLang's affair: 0.5.23 ends with any error of an encoder, see docs/sglang.md."""
    kill = Killer()
    with bench.prefill() as prefill, Gate(kill) as gate:
        prefill.answering("/health")
        with bench.ours(prefill, "--advertise-port", str(gate.port)) as ours:
            gate.target = ours.url
            prefill.with_encoders(1)
            kill.victims.append(ours)
            try:
                assert prefill.ask(image(png(11))).status_code >= 400
            except httpx.TransportError:
                pass
            assert not kill.victims
