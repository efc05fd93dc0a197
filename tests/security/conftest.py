"""One server with small limits, shared by the tests of this folder."""

from __future__ import annotations

import pytest

from encode_server.models.demo import write_demo
from tests.live import LiveServer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint") / "demo"
    write_demo(directory)
    return directory


@pytest.fixture(scope="session")
def server(checkpoint, tmp_path_factory):
    tmp = tmp_path_factory.mktemp("server")
    options = ("--max-inflight-mb", "256", "--undelivered-mb", "16", "--max-answer-mb", "24", "--send-timeout-s", "3")
    options += ("--media-allow", "127.0.0.1")
    options += ("--ec-store", str(tmp / "store"), "--profile-dir", str(tmp / "profiles"))
    with LiveServer(checkpoint, tmp / "s", *options) as live:
        yield live.healthy()
