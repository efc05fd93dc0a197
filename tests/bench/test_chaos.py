"""Chaos, for a short while: processes killed and stopped, crashing decoders, poison, vanishing peers, under load."""

import json

import pytest

from benchmarks import chaos


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_chaos_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["chaos", "--minutes=0.6", f"--json={tmp_path / 'found.json'}"])
    assert chaos.main() == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["delivered"] > 0 and found["lost"] == found["wrong"] == 0
    assert found["group_restarts"] >= found["faults"]["ranks hit by SIGKILL"] >= 1
    assert found["preparer_restarts"] >= found["faults"]["preparers hit by SIGKILL"] >= 1
    assert found["faults"]["decoders crashed"]
    assert found["faults"]["clients gone"] and found["faults"]["destinations killed"] and found["faults"]["slow media"]
