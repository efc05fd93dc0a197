"""The real vLLM with our connector: embeddings are pushed to it, and its answers are those of its own encoder."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.interop.engines import free_port
from tests.interop.vllm_cpu import has_avx512, with_nixl
from tests.interop.vllm_engine import LOGPROB, Vllm, ask, media
from tests.live import LiveServer

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not has_avx512(), reason="vLLM's CPU engine needs AVX-512"),
]

HERE = Path(__file__).parent


@pytest.mark.parametrize(("tp", "transport"), [(1, "zmq"), (2, "zmq"), (1, "nixl")])
def test_its_answers_are_the_same_and_it_outlives_an_encoder(tmp_path, tp, transport):
    if transport == "nixl":
        pytest.importorskip("nixl_cu12", reason="NIXL is not installed")
        with_nixl()
    checkpoint = tmp_path / "checkpoint"
    subprocess.run([sys.executable, HERE / "make_checkpoint.py", checkpoint, "small"], check=True)
    receives = f"127.0.0.1:{free_port()}"
    consumer = {
        "ec_connector": "EncodeServerConnector",
        "ec_role": "ec_consumer",
        "ec_connector_module_path": "encode_server.vllm.connector",
        "ec_connector_extra_config": {"bind": f"tcp://{receives}", "wait_s": 1, "nixl": transport == "nixl"},
    }
    with (
        Vllm(checkpoint, tmp_path / "vllm.log", consumer, "--tensor-parallel-size", str(tp)) as engine,
        LiveServer(checkpoint, tmp_path / "tmp", *(("--nixl-pool-mb", "64") if transport == "nixl" else ())) as live,
    ):
        live.healthy(300)
        engine.until_up()
        command = [sys.executable, "-m", "encode_server.cli", "route", "--port", "0", "--engine-url", engine.url]
        options = ["--engine-receives", receives, "--encoder-url", live.base_url, "--engine-transport", transport]
        with LiveServer("", tmp_path / "route", command=[*command, *options]) as router:
            router.listening()
            for kind, part in media().items():
                started = time.monotonic()
                ours = ask(router.base_url, part)
                middle = time.monotonic()
                own = ask(engine.url, part)
                seconds = f"{middle - started:.2f} s against {time.monotonic() - middle:.2f} s"
                print(f"\ntp {tp}, {kind}, {transport}: {ours}\ntp {tp}, {kind}, own:    {own}\n{seconds}")
                assert ours[0] == own[0], "prompt tokens"
                assert max(abs(a - b) for a, b in zip(ours[1], own[1], strict=True)) <= LOGPROB
            both = list(media().values())
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda _: ask(router.base_url, *both), range(8)))
            assert len({answer[0] for answer in answers}) == 1
        # Named as if it had been pushed, but nothing comes: after a second vLLM encodes the item itself.
        for part in media().values():
            assert ask(engine.url, part | {"uuid": "es-never-pushed-" + part["type"]})[0] > 0
        assert engine.process.poll() is None
    text = engine.log.read_text()
    read = set(re.findall(r"read (es-\S+), \d+ bytes, from the memory of", text))
    assert len(read) == (len(media()) if transport == "nixl" else 0), "which items were read by NIXL"
    assert text.count("loaded es-") >= tp * len(media()), "it encoded by itself"
