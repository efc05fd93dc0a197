"""The README's commands and snippets, run from its own text by somebody who has just installed the client."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from encode_server.media.samples import picture
from encode_server.models.demo import write_demo
from tests.live import LiveServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LINES = 110  # a page


def snippet(language: str, holding: str) -> str:
    """The one code block of `language` that holds a text."""
    found = [block for block in re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL) if holding in block]
    assert len(found) == 1, f"{len(found)} blocks hold {holding!r}"
    return found[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("readme")
    write_demo(tmp / "checkpoint")
    with LiveServer(tmp / "checkpoint", tmp / "server") as live:
        yield live.healthy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the reader works, with an image."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "image.jpg").write_bytes(picture())  # a PNG: nobody looks at the name
    return folder


@pytest.fixture(scope="module")
def light_python(tmp_path_factory):
    """The interpreter of a fresh virtual environment with `pip install encode-server`, of this checkout."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("needs uv")
    python = tmp_path_factory.mktemp("light") / "bin" / "python"
    for command in (
        ["venv", "--python", sys.executable, python.parent.parent],
        ["pip", "install", "--python", python, "--constraint", ROOT / "constraints.txt", ROOT],
    ):
        subprocess.run([uv, *command, "--quiet"], check=True, timeout=200)
    return python


def test_it_is_one_page_that_opens_with_the_two_commands():
    assert len(README.splitlines()) <= LINES
    commands = snippet("sh", "uv run pytest")
    assert "pip install uv && uv run encode-server demo" in commands
    assert "pip install uv && uv run pytest" in commands


def test_curl(server, folder):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    command = snippet("sh", "curl -F").replace("http://127.0.0.1:30000", server.base_url)
    subprocess.run(["sh", "-ec", command.replace("curl", "curl --fail --silent --show-error")], cwd=folder, check=True)
    assert b'"shape":"[192, 128]"' in (folder / "embedding.safetensors").read_bytes()


def test_the_client_in_a_light_install(server, folder, light_python):
    code = snippet("python", "EncodeClient").replace("http://127.0.0.1:30000", server.base_url)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([light_python, "-c", code], cwd=folder, env=clean, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("(192, 128) float32 ")
    packages = {path.name for path in light_python.parent.parent.glob("lib/python*/site-packages/*")}
    assert {"encode_server", "httpx", "zmq"} <= packages
    assert not packages & {"torch", "transformers", "av", "soundfile", "soxr"}
    assert (next(light_python.parent.parent.glob("lib/python*/site-packages/encode_server")) / "py.typed").exists()


def test_the_scheduler(server, folder):
    command = snippet("sh", "examples/scheduler.py").replace("http://127.0.0.1:30000", server.base_url)
    arguments = command.split()
    assert arguments[:3] == ["uv", "run", "python"]
    done = subprocess.run(
        [sys.executable, ROOT / arguments[3], *arguments[4:]], cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert "'request-0': (192, 128)" in done.stdout, done.stderr
