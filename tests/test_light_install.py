"""`pip install encode-server`: the client, the proxy and the load generator, without what only a server needs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PYPROJECT = tomllib.loads(Path(__file__).parent.parent.joinpath("pyproject.toml").read_text())["project"]
MODULES = {"huggingface-hub": "huggingface_hub", "prometheus-client": "prometheus_client"} | {
    "python-multipart": "python_multipart",
    "fastapi-offline": "fastapi_offline",
}


def server_modules() -> list[str]:
    names = [line.partition(">")[0] for line in PYPROJECT["optional-dependencies"]["server"]]
    base = {line.partition(">")[0] for line in PYPROJECT["dependencies"]}
    return [MODULES.get(name, name) for name in names if name not in {*base, "httpcore"}]  # httpx brings httpcore


def run_light(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python code where the server's packages cannot be imported."""
    hidden = "import sys; sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(','))); "
    command = [sys.executable, "-c", hidden + code, ",".join(server_modules()), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_torch_and_the_decoders_belong_to_the_server_alone():
    assert {"torch", "transformers", "torchvision", "av", "soundfile", "soxr"} <= set(server_modules())


@pytest.mark.parametrize("module", ["client", "route.serve", "bench.command", "bench.load", "cli"])
def test_what_the_light_install_holds_can_be_imported(module):
    done = run_light(f"import encode_server.{module}")
    assert done.returncode == 0, done.stderr


def test_the_load_generator_makes_images_and_audio():
    done = run_light("from encode_server.bench.source import pool; print(len(pool('32')), len(pool('audio')))")
    assert done.stdout.split() == ["8", "1"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["serve", "demo"], "server"),
        (["demo", "--once"], "server"),
        (["demo-model", "/nowhere"], "server"),
        (["bench", "http://127.0.0.1:9", "--media", "video"], "bench"),
    ],
)
def test_a_command_that_needs_more_says_what_to_install(arguments, extra):
    done = run_light("from encode_server.cli import console; console()", *arguments)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"pip install 'encode-server[{extra}]'" in done.stderr
