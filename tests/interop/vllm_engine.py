"""A real vLLM as a process, and the questions it is asked."""

from __future__ import annotations

import base64
import itertools
import json
import os
import socket
import subprocess
import time
from pathlib import Path

import httpx

from encode_server.media import samples as demo_media
from tests.interop.vllm_cpu import vllm_python
from tests.models.samples import png

REPOSITORY = Path(__file__).parent.parent.parent
LOGPROB = 1e-3


class Vllm:
    """vLLM's OpenAI server on the CPU in float32, with a consumer of embeddings."""

    def __init__(self, checkpoint: Path, log: Path, consumer: dict[str, object], *options: str) -> None:
        self.log = log
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        given = {
            "--model": str(checkpoint),
            "--served-model-name": "m",
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": "float32",
            "--max-model-len": "2048",
            "--ec-transfer-config": json.dumps(consumer),
        }
        module = [vllm_python(), "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "DEBUG", "HF_HUB_OFFLINE": "1"}
        if "--tensor-parallel-size" in options:  # each rank needs cores of its own
            ranks = int(options[options.index("--tensor-parallel-size") + 1])
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, range(ranks)))
        variables["PYTHONPATH"] = str(REPOSITORY)  # our connector
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*module, *itertools.chain(*given.items()), *options],
                env=os.environ | variables,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def until_up(self) -> Vllm:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(self.url + "/health", timeout=5).status_code == 200:
                    return self
            except httpx.TransportError:
                pass
            time.sleep(1)
        raise AssertionError(f"vLLM did not start:\n{self.log.read_text()[-4000:]}")


def media() -> dict[str, dict[str, object]]:
    picture = "data:image/png;base64," + base64.b64encode(png(112, 112, 7)).decode()
    video = "data:video/mp4;base64," + base64.b64encode(demo_media.clip()).decode()
    return {
        "image": {"type": "image_url", "image_url": {"url": picture}},
        "video": {"type": "video_url", "video_url": {"url": video}},
    }


def ask(url: str, *parts: dict[str, object]) -> tuple[int, list[float]]:
    """Prompt tokens, and log-probabilities of eight greedy tokens."""
    message = {"role": "user", "content": [*parts, {"type": "text", "text": "hello"}]}
    body = {"model": "m", "max_tokens": 8, "temperature": 0, "logprobs": True, "messages": [message]}
    answer = httpx.post(url + "/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    document = answer.json()
    tokens = document["choices"][0]["logprobs"]["content"]
    return document["usage"]["prompt_tokens"], [round(token["logprob"], 4) for token in tokens]
