"""Servers shared by the tests of this folder: starting one costs seconds."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from encode_server.models.demo import write_demo
from tests.live import LiveServer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The demo checkpoint, with vision and audio towers."""
    directory = tmp_path_factory.mktemp("checkpoint") / "demo"
    write_demo(directory)
    return directory


@pytest.fixture(scope="session")
def reference(checkpoint):
    from tests.server.reference import OmniReference

    return OmniReference(checkpoint)


@pytest.fixture(scope="session")
def server(checkpoint, tmp_path_factory):
    with LiveServer(checkpoint, tmp_path_factory.mktemp("server")) as live:
        yield live.healthy()


@pytest.fixture(scope="session")
def tp2(checkpoint, tmp_path_factory):
    with LiveServer(checkpoint, tmp_path_factory.mktemp("tp2"), "--tp", "2") as live:
        yield live.healthy()


@pytest.fixture(scope="session")
def picture():
    """PNG bytes of a random picture: `picture(width, height, seed)`."""

    def make(width: int, height: int, seed: int = 0) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()

    return make
