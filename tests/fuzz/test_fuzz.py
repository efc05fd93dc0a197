"""The inputs that are kept still pass; with `-m fuzz`, new ones are looked for, `FUZZ_S` seconds in all (600)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs(name):
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        TARGETS[name](path.read_bytes())


@pytest.mark.fuzz
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", TARGETS)
def test_new_inputs(name, tmp_path):
    pytest.importorskip("atheris")
    shutil.copytree(CORPUS / name, tmp_path / "seeds")
    (tmp_path / "found").mkdir()
    seconds = max(5, int(os.environ.get("FUZZ_S", "600")) // len(TARGETS))
    options = (f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=3000", "-max_len=65536")
    options += (f"-artifact_prefix={tmp_path}/crash-", str(tmp_path / "found"), str(tmp_path / "seeds"))
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run", name, *options], capture_output=True, text=True, timeout=seconds + 300
    )
    crashes = [(path.name, path.read_bytes()[:2000]) for path in tmp_path.glob("crash-*")]
    assert run.returncode == 0 and not crashes, f"{crashes}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
