"""The real vLLM is given metadata in place of media: equal answers, and nothing is fetched or preprocessed there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from encode_server.media import samples as demo_media
from tests.interop.engines import free_port
from tests.interop.media_server import MediaServer
from tests.interop.vllm_cpu import has_avx512
from tests.interop.vllm_engine import LOGPROB, Vllm, ask
from tests.live import LiveServer
from tests.models.samples import png

pytestmark = [
    pytest.mark.interop,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not has_avx512(), reason="vLLM's CPU engine needs AVX-512"),
]

HERE = Path(__file__).parent
FILES = {"a.png": png(112, 112, 7), "b.png": png(224, 112, 8), "c.png": png(56, 112, 9), "v.mp4": demo_media.clip()}


@pytest.mark.parametrize("model", ["small", "qwen3"])
def test_metadata_do_for_vllm(tmp_path, model):
    """`small` is a Qwen2.5-VL, whose videos go along: their timing is in the media alone."""
    checkpoint, receives = tmp_path / "checkpoint", f"127.0.0.1:{free_port()}"
    subprocess.run([sys.executable, HERE / "make_checkpoint.py", checkpoint, model], check=True)
    consumer = {
        "ec_connector": "EncodeServerConnector",
        "ec_role": "ec_consumer",
        "ec_connector_module_path": "encode_server.vllm.connector",
        "ec_connector_extra_config": {"bind": f"tcp://{receives}", "wait_s": 1},
    }
    with (
        MediaServer(FILES) as media,
        Vllm(checkpoint, tmp_path / "vllm.log", consumer, "--enable-scale-out") as engine,
        LiveServer(checkpoint, tmp_path / "tmp", "--media-allow", "127.0.0.0/8", "--dtype", "float32") as live,
    ):

        def image(name: str) -> dict[str, object]:
            return {"type": "image_url", "image_url": {"url": f"{media.url}/{name}"}}

        video = {"type": "video_url", "video_url": {"url": f"{media.url}/v.mp4"}}
        live.healthy(300)
        engine.until_up()
        command = [sys.executable, "-m", "encode_server.cli", "route", "--port", "0", "--engine-url", engine.url]
        options = ["--engine-receives", receives, "--encoder-url", live.base_url]
        with LiveServer("", tmp_path / "route", command=[*command, *options]) as router:
            url = router.listening().base_url
            for parts in ([image("a.png")], [image("b.png"), image("c.png")], [image("a.png"), video]):
                before = engine_fetches(media)
                ours = ask(url, *parts)
                fetched = engine_fetches(media) - before
                own = ask(engine.url, *parts)
                print(f"\n{model}, metadata: {ours}\n{model}, own:      {own}\nfetched by the engine: {fetched}")
                assert ours[0] == own[0], "prompt tokens"
                assert max(abs(a - b) for a, b in zip(ours[1], own[1], strict=True)) <= LOGPROB
                assert bool(fetched) == (video in parts and model == "small")
            assert 'route_engine_renames{modality="image"} 0.0' in httpx.get(url + "/metrics").text
        for name in ("es-p-never-pushed", "nobody"):
            metadata = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 4]}, "uuid": name}
            body = {"model": "m", "messages": [{"role": "user", "content": [metadata]}]}
            assert httpx.post(engine.url + "/v1/chat/completions", json=body, timeout=60).status_code == 500
        assert ask(engine.url, image("a.png"))[0] > 0, "the engine lives"


def engine_fetches(media: MediaServer) -> int:
    return sum(count for (_, who), count in media.fetched.items() if who == "vLLM")
