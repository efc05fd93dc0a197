"""The recovery benchmark: what it counts as lost, and, slowly, that it runs through."""

from __future__ import annotations

import json

import pytest

from benchmarks import recovery
from benchmarks.outcomes import Tally
from encode_server.bench.client import Response


def test_only_what_was_accepted_can_be_lost():
    tally = Tally()
    tally.enter(Response(200, 0, b"", {}))
    tally.enter(Response(503, 0, b"", {"retry-after": "2"}))
    tally.enter(Response(503, 0, b"", {}))
    tally.enter(Response(0, 0, b"", {}, "connection lost"))
    assert tally.counts == {"answered": 1, "refused": 1, "lost": 2}
    assert sum(tally.reasons.values()) == 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nothing_is_lost_with_any_process(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert recovery.main(["--kills=1", "--starve-s=2", f"--json={file}"]) == 0
    found = json.loads(file.read_text())
    assert {kind: len(seconds) for kind, seconds in found["kills"].items()} == dict.fromkeys(recovery.KINDS, 1)
    assert found["requests"]["answered"] > 0
    assert "until that is found" in capsys.readouterr().out
