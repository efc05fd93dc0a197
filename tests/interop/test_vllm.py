"""The real vLLM: its connector loads what we store, and its answers are the same with our encoder as with its own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from encode_server.client import EncodeClient, Item
from tests.checkpoints import Checkpoints
from tests.interop.vllm_cpu import has_avx512, vllm_python
from tests.interop.vllm_engine import LOGPROB, Vllm, ask, media
from tests.live import LiveServer
from tests.models.samples import clip, png

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1200)]

HERE = Path(__file__).parent


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
    checkpoint, store = tmp_path / "checkpoint", tmp_path / "store"
    subprocess.run([sys.executable, HERE / "make_checkpoint.py", checkpoint, "small"], check=True)
    consumer = {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_consumer",
        "ec_connector_extra_config": {"shared_storage_path": str(store)},
    }
    with (
        Vllm(checkpoint, tmp_path / "vllm.log", consumer) as engine,
        LiveServer(checkpoint, tmp_path / "tmp", "--ec-store", str(store)) as live,
    ):
        live.healthy(300)
        engine.until_up()
        route = [sys.executable, "-m", "encode_server.cli", "route", "--port", "0"]
        urls = ["--engine-url", engine.url, "--encoder-url", live.base_url]
        with LiveServer("", tmp_path / "route", command=[*route, *urls]) as router:
            router.listening()
            for kind, part in media().items():
                ours, own = ask(router.base_url, part), ask(engine.url, part)
                print(f"\n{kind}, our encoder: {ours}\n{kind}, its own:     {own}")
                assert ours[0] == own[0], "prompt tokens"
                assert max(abs(a - b) for a, b in zip(ours[1], own[1], strict=True)) <= LOGPROB
    assert engine.log.read_text().count("Success load encoder cache") == len(media()), "it encoded by itself"
