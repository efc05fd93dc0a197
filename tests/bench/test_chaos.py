"""Chaos, for a short while: ranks killed and stopped, poison, vanishing clients and destinations, under load."""

import json

import pytest

from benchmarks import chaos


@pytest.mark.timeout(400)
def test_chaos_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["chaos", "--minutes=0.6", f"--json={tmp_path / 'found.json'}"])
    assert chaos.main() == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["delivered"] > 0 and found["lost"] == found["wrong"] == 0
    assert found["group_restarts"] >= found["faults"]["ranks hit by SIGKILL"] >= 1
    assert found["faults"]["clients gone"] and found["faults"]["destinations killed"] and found["faults"]["slow media"]
