"""Real vLLMs: milliseconds to the first token, and bytes moved, with its own encoder, the file store and our connector.

Prints the table of docs/vllm.md. Each round asks every way once about an image of its own, so that the rows
of one run compare. `ROUNDS` says how many rounds."""

from __future__ import annotations

import base64
import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.interop.engines import HERE, free_port
from tests.interop.relay import Relay
from tests.interop.vllm_cpu import has_avx512, with_nixl
from tests.interop.vllm_engine import Vllm
from tests.live import LiveServer
from tests.models.samples import png

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not has_avx512(), reason="vLLM's CPU engine needs AVX-512"),
]
ROUNDS = int(os.environ.get("ROUNDS", "20"))
WARM = 3
SIDES = (112, 280, 560)


@dataclass
class Way:
    """A way from an image to its first token: whom to ask, and where bodies and embeddings pass by."""

    url: str
    bodies: Relay
    embeddings: Relay | Path | None
    first_ms: list[float] = field(default_factory=list)
    body_bytes: list[int] = field(default_factory=list)
    embedding_bytes: list[int] = field(default_factory=list)

    def ask(self, image: bytes) -> None:
        bodies, embeddings = self.bodies.forwarded, self._embedding_bytes()
        self.first_ms.append(first_token_ms(self.url, image))
        self.body_bytes.append(self.bodies.forwarded - bodies)
        self.embedding_bytes.append(self._embedding_bytes() - embeddings)

    def forget(self) -> None:
        """What was measured so far was to warm up."""
        self.first_ms.clear(), self.body_bytes.clear(), self.embedding_bytes.clear()

    def _embedding_bytes(self) -> int:
        match self.embeddings:
            case Relay():
                return self.embeddings.forwarded + self.embeddings.returned
            case Path():
                return sum(file.stat().st_size for file in self.embeddings.rglob("*.safetensors"))
        return 0


def first_token_ms(url: str, image: bytes) -> float:
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "hello"}]
    body = {"model": "m", "max_tokens": 1, "stream": True, "messages": [{"role": "user", "content": content}]}
    started = time.monotonic()
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=120) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith('data: {"'):  # the engine says who speaks when there is a first token, not before
                return (time.monotonic() - started) * 1e3
    raise AssertionError("no token came")


@pytest.mark.parametrize("nixl", [False, True])
def test_milliseconds_to_the_first_token(tmp_path: Path, nixl: bool) -> None:
    """With NIXL in a run of its own: the threads of NIXL take time from everything on a machine with few cores."""
    if nixl:
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
        with_nixl()
    checkpoint, store, receives = tmp_path / "checkpoint", tmp_path / "store", f"127.0.0.1:{free_port()}"
    store.mkdir()
    subprocess.run([sys.executable, HERE / "make_checkpoint.py", checkpoint, "small"], check=True)
    files = {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {"shared_storage_path": str(store)},
    }
    pushed = {
        "ec_connector": "EncodeServerConnector",
        "ec_role": "ec_consumer",
        "ec_connector_module_path": "encode_server.vllm.connector",
        "ec_connector_extra_config": {"bind": f"tcp://{receives}", "nixl": nixl},
    }
    with ExitStack() as stack:
        options = ("--ec-store", str(store), *(("--nixl-pool-mb", "64") if nixl else ()))
        encoder = stack.enter_context(LiveServer(checkpoint, tmp_path / "encoder", *options))

        def relayed(url: str) -> Relay:
            return stack.enter_context(Relay(url))

        def engine(log: str, consumer: dict[str, object]) -> Relay:
            return relayed(stack.enter_context(Vllm(checkpoint, tmp_path / log, consumer)).until_up().url)

        def route(name: str, before: Relay, *more: str) -> str:
            command = [sys.executable, "-m", "encode_server.cli", "route", "--port", "0", "--engine-url", before.url]
            command += ["--encoder-url", encoder.base_url, *more]
            return stack.enter_context(LiveServer("", tmp_path / name, command=command)).listening().base_url

        ours, inbox = engine("pushed.log", pushed), relayed("http://" + receives)
        encoder.healthy(300)
        to = ("--engine-receives", f"127.0.0.1:{inbox.port}")
        ways = {
            "vLLM's own encoder": Way(ours.url, ours, None),
            "our connector, metadata": Way(route("metadata", ours, *to), ours, inbox),
        }
        if nixl:
            url = route("nixl", ours, *to, "--engine-transport", "nixl")
            ways["our connector, metadata, NIXL"] = Way(url, ours, inbox)
        else:
            url = route("media", ours, *to, "--forward-media", "always")
            ways["our connector, with media"] = Way(url, ours, inbox)
            theirs = engine("files.log", files)
            ways["file store"] = Way(route("files", theirs), theirs, store)
        print(f"\n{ROUNDS} images a row, medians; bytes of one image\n")
        print("| image | way | first token, ms | quartiles | to the engine's API | embedding |")
        print("| --- | --- | --- | --- | --- | --- |")
        for side in SIDES:
            for number in range(WARM + ROUNDS):
                if number == WARM:
                    for way in ways.values():
                        way.forget()
                for index, way in enumerate(ways.values()):
                    way.ask(png(side, side, number * len(ways) + index))
            for name, way in ways.items():
                low, middle, high = statistics.quantiles(way.first_ms, n=4)
                moved = f"{statistics.median(way.body_bytes):,.0f} | {statistics.median(way.embedding_bytes):,.0f}"
                print(f"| {side}² | {name} | {middle:.0f} | {low:.0f} to {high:.0f} | {moved} |", flush=True)
    count = len(SIDES) * (WARM + ROUNDS)
    text = (tmp_path / "pushed.log").read_text()
    assert text.count("loaded es-") == 2 * count, "vLLM encoded by itself"
    if nixl:
        assert text.count("from the memory of") == count
    else:
        assert (tmp_path / "files.log").read_text().count("Success load encoder cache") == count
