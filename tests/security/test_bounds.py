"""The table of bounds is what the docs show, and the memory that it allows for is what the operator is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from encode_server import memory
from encode_server.bounds import bounds, table
from encode_server.cli import main
from encode_server.settings import Settings, option_name
from encode_server.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]


def test_the_docs_show_the_table():
    assert table(bounds(Settings())) in (ROOT / "docs" / "security.md").read_text(), (
        "docs/security.md: put in what `encode-server serve --explain-limits` prints"
    )


def test_every_bound_has_an_owner_an_option_and_a_metric_that_exist():
    shown = Metrics().render()[0].decode()
    for bound in bounds(Settings()):
        assert (ROOT / "encode_server" / bound.owner).is_file(), bound
        assert not bound.option or bound.option in Settings.model_fields, bound
        assert not bound.metric or f"# TYPE {bound.metric} " in shown, bound


def test_options_change_the_table():
    default, changed = bounds(Settings()), bounds(Settings(max_body_mb=7, least_rate_kb=3, ec_store_gb=1.5))
    differ = {new.option for old, new in zip(default, changed, strict=True) if old != new}
    assert differ == {"max_body_mb", "least_rate_kb", "ec_store_gb"}


@pytest.mark.parametrize(
    "option",
    [name for name in Settings.model_fields if name.startswith("max_") or name.endswith(("_mb", "_gb"))],
)
def test_every_limit_among_the_options_is_in_the_table(option):
    if option == "max_restarts":
        pytest.skip("no limit of strangers")
    assert option in {bound.option for bound in bounds(Settings())}


def test_the_worst_case_is_the_sum_of_its_parts_and_follows_the_options(monkeypatch):
    small = Settings(
        max_inflight_mb=64, undelivered_mb=16, cache_gb=0, arena_mb=16, preproc_processes=1, preproc_memory_mb=512
    )
    assert sum(part.nbytes for part in memory.worst_case(small)) < sum(p.nbytes for p in memory.worst_case(Settings()))
    monkeypatch.setattr(memory, "available", lambda: 1 << 30)
    assert "--explain-limits" in (memory.warning(Settings()) or "")
    monkeypatch.setattr(memory, "available", lambda: 1 << 50)
    assert memory.warning(Settings()) is None


@pytest.mark.parametrize(
    ("options", "more_mb"),
    [
        ({"nixl_pool_mb": 100}, 100),
        ({"mooncake_host": "10.0.0.1", "protocol": "sglang", "mooncake_pool_mb": 50}, 50),
        ({"shared_cache": "redis://host"}, 128),
        ({"shared_cache": "mooncake://host:1/64", "mooncake_host": "10.0.0.1"}, 128 + 128 + 64),
    ],
)
def test_the_worst_case_has_what_only_some_options_need(options, more_mb):
    def needed(settings: Settings) -> int:
        return sum(part.nbytes for part in memory.worst_case(settings))

    assert needed(Settings(**options)) - needed(Settings()) == more_mb << 20


def test_a_control_groups_memory_counts(tmp_path):
    proc, mount = tmp_path / "cgroup", tmp_path / "mount"
    group = mount / "a/b"
    group.mkdir(parents=True)
    proc.write_text("0::/a/b\n")
    (group / "memory.max").write_text("max\n")
    assert memory.available(proc, mount) > 1 << 20
    (group.parent / "memory.max").write_text("1048576\n")
    assert memory.available(proc, mount) == 1 << 20


def test_the_command_explains(capsys):
    assert main(["serve", "--explain-limits", "--max-body-mb", "7"]) == 0
    out = capsys.readouterr().out
    assert "| a body | 7 MiB | `--max-body-mb` |" in out and re.search(r"[\d.]+ GiB +in all", out)
    assert option_name("arena_mb") in out


def test_security_md_names_options_that_exist():
    text = (ROOT / "SECURITY.md").read_text()
    known = {option_name(name) for name in Settings.model_fields} | {"--explain-limits", "--http", "--engine"}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known
