"""Servers shared by the tests of this folder: starting one costs seconds."""

from __future__ import annotations

import pytest

from encode_server.media.samples import noise
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
    return noise
