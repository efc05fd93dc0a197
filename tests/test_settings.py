"""Options by their present and their former names."""

from __future__ import annotations

import argparse
import logging

import pytest

from encode_server import cli
from encode_server.errors import StartupError
from encode_server.service.options import shared_address
from encode_server.settings import load_settings, redacted


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("ENCODE_SERVER_ENGINE", "ENCODE_SERVER_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)


def test_a_former_option_is_taken_and_its_present_name_is_logged_once(caplog):
    with caplog.at_level(logging.WARNING):
        assert load_settings({"engine": "sglang"}).protocol == "sglang"
    said = "--engine is called --protocol now; the old name still works"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_former_variable_is_taken(monkeypatch, caplog):
    monkeypatch.setenv("ENCODE_SERVER_ENGINE", "sglang")
    with caplog.at_level(logging.WARNING):
        assert load_settings().protocol == "sglang"
    assert "ENCODE_SERVER_ENGINE is called ENCODE_SERVER_PROTOCOL now" in caplog.text


def test_the_present_name_wins(monkeypatch):
    monkeypatch.setenv("ENCODE_SERVER_ENGINE", "sglang")
    assert load_settings({"protocol": "native"}).protocol == "native"
    monkeypatch.setenv("ENCODE_SERVER_PROTOCOL", "native")
    assert load_settings().protocol == "native"


def test_a_wrong_value_is_one_sentence():
    with pytest.raises(StartupError, match="--protocol: got 'vllm', takes 'native' or 'sglang'"):
        load_settings({"engine": "vllm"})


def test_the_command_line_takes_both_and_shows_one(monkeypatch, capsys):
    served = []
    monkeypatch.setattr("encode_server.serve.serve", lambda settings, launched: served.append(settings.protocol) or 0)
    assert cli.main(["serve", "demo", "--engine", "sglang"]) == cli.main(["serve", "demo", "--protocol", "sglang"]) == 0
    assert served == ["sglang", "sglang"]
    with pytest.raises(SystemExit):
        cli.main(["serve", "--help"])
    shown = capsys.readouterr().out
    assert "--protocol" in shown and "--engine" not in shown


@pytest.mark.parametrize("url", ["redis://:h1dden@host:port", "memcached://:h1dden@host", "redis://:h1dden@host/x"])
def test_the_shared_caches_password_is_in_no_message(url):
    with pytest.raises(StartupError, match="--shared-cache") as error:
        shared_address(load_settings({"shared_cache": url}))
    assert "h1dden" not in str(error.value)


def test_the_shared_caches_password_is_shown_to_nobody():
    shown = redacted(load_settings({"shared_cache": "redis://me:h1dden@host:6379/3"}))
    assert shown["shared_cache"] == "redis://host:6379/3"


@pytest.mark.parametrize(
    ("given", "trusting"), [([], False), (["--trust-content-hash"], True), (["--trust-content-hash", "false"], False)]
)
def test_an_option_that_is_on_or_off(given, trusting):
    parser = argparse.ArgumentParser()
    cli._add_options(parser, "")
    assert load_settings(vars(parser.parse_args(given))).trust_content_hash is trusting
