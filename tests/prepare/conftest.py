"""The stand-in takes the place of the real worker in every test of this folder that starts preparers."""

from __future__ import annotations

from pathlib import Path

import pytest

from encode_server.prepare import preparers


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparers, "ENTRY", "tests.prepare.fake_worker:main")
    monkeypatch.setattr(preparers, "WATCH_S", 0.02)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
