"""Two encoders serve a real SGLang and a real vLLM at the same time, through two routes: what one engine's users had
encoded is in the cache for the other's."""

from __future__ import annotations

import base64
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.interop.engines import Engine, Prefill, free_port, our_encoder
from tests.interop.test_sglang import HERE, png
from tests.interop.test_sglang_fleet import Balancer
from tests.interop.vllm_cpu import has_avx512
from tests.interop.vllm_engine import Vllm
from tests.live import LiveServer

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not has_avx512(), reason="vLLM's CPU engine needs AVX-512"),
]

IMAGES = 20


def test_one_fleet_for_both(tmp_path: Path) -> None:
    checkpoint, receives = tmp_path / "checkpoint", f"127.0.0.1:{free_port()}"
    subprocess.run([sys.executable, HERE / "make_checkpoint.py", checkpoint, "small"], check=True)
    consumer = {
        "ec_connector": "EncodeServerConnector",
        "ec_role": "ec_consumer",
        "ec_connector_module_path": "encode_server.vllm.connector",
        "ec_connector_extra_config": {"bind": f"tcp://{receives}"},
    }
    with ExitStack() as stack:
        vllm = stack.enter_context(Vllm(checkpoint, tmp_path / "vllm.log", consumer))
        vllm.until_up()
        prefill = stack.enter_context(Prefill(checkpoint, tmp_path / "prefill.log"))
        prefill.answering("/health")
        sglang = stack.enter_context(Balancer(prefill, tmp_path / "route-sglang.log"))
        sglang.answering("/livez")
        encoders = [
            stack.enter_context(our_encoder(checkpoint, tmp_path / f"encoder-{i}.log", sglang.url)) for i in range(2)
        ]
        for encoder in encoders:
            encoder.answering("/health")
        command = [sys.executable, "-m", "encode_server.cli", "route", "--port", "0", "--engine-url", vllm.url]
        options = [part for encoder in encoders for part in ("--encoder-url", encoder.url)]
        command += ["--engine-receives", receives, *options]
        router = stack.enter_context(LiveServer("", tmp_path / "route", command=command))
        prefill.with_encoders(1)

        def ask(url: str, seed: int) -> int:
            uri = "data:image/png;base64," + base64.b64encode(png(seed, 112, 112)).decode()
            content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "hello"}]
            body = {"model": "m", "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
            return httpx.post(url + "/v1/chat/completions", json=body, timeout=300).status_code

        urls = [router.listening().base_url, sglang.url]
        with ThreadPoolExecutor(4) as pool:
            # Each image is asked about by one engine first, by half of them each; both engines work concurrently.
            first = Counter(pool.map(lambda seed: ask(urls[seed % 2], seed), range(IMAGES)))
            before = encoded(encoders)
            second = Counter(pool.map(lambda seed: ask(urls[1 - seed % 2], seed), range(IMAGES)))
        again = encoded(encoders) - before
        print(f"\n{IMAGES} images, first {dict(first)}, then at the other engine {dict(second)}")
        print(f"{before} encoded at first; of the second {IMAGES}, {IMAGES - again} were in the cache")
        assert first == second == {200: IMAGES}
        assert prefill.process.poll() is None and vllm.process.poll() is None
        assert again < IMAGES // 2, "an item goes to another encoder only when its owner is busy"


def encoded(encoders: list[Engine]) -> int:
    """Items that no cache knew, at all encoders since their start."""
    name = 'encode_cache_lookups_total{outcome="miss"}'
    texts = [httpx.get(encoder.url + "/metrics").text for encoder in encoders]
    return int(sum(float(line.split()[-1]) for text in texts for line in text.splitlines() if line.startswith(name)))
