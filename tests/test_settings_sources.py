"""Where options come from: flags, then variables, then a file, then defaults; what is wrong is said in one line."""

from __future__ import annotations

import os

import pytest

from encode_server import cli
from encode_server.errors import StartupError
from encode_server.settings import load_settings, redacted, unknown_variables


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in list(os.environ):
        if name.startswith("ENCODE_SERVER_"):
            monkeypatch.delenv(name)


@pytest.fixture
def config(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "options.toml").write_text(text)
        return str(tmp_path / "options.toml")

    return write


def test_flags_over_variables_over_file_over_defaults(config, monkeypatch):
    path = config('tp = 2\nmax-items = 3\nmax_pixels = 1000\nmedia_allow = ["a.example", "b.example"]\n')
    monkeypatch.setenv("ENCODE_SERVER_MAX_ITEMS", "4")
    monkeypatch.setenv("ENCODE_SERVER_MAX_PIXELS", "")  # empty counts as absent
    settings = load_settings({"config": path, "tp": "8"})
    assert (settings.tp, settings.max_items, settings.max_pixels) == (8, 4, 1000)
    assert settings.media_allow == ("a.example", "b.example") and settings.max_requests == 1024


def test_a_variable_may_name_the_file(config, monkeypatch):
    monkeypatch.setenv("ENCODE_SERVER_CONFIG", config("port = 1234"))
    assert load_settings().port == 1234
    assert unknown_variables() == []


def test_the_command_line_takes_it(config, monkeypatch):
    served = []
    monkeypatch.setattr("encode_server.cli.launch", lambda *_: None)
    monkeypatch.setattr("encode_server.serve.serve", lambda settings, _: served.append(settings.tp) or 0)
    assert cli.main(["serve", "demo", "--config", config("tp = 4")]) == 0 and served == [4]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_item = 3", "max_item is no option, did you mean max_items?"),
        ("[server]\ntp = 2", "server is no option"),
        ("tp = 'x'", "tp: got 'x', takes an integer"),
        ("tp = 2\nt p", "not TOML: "),
        ("max-items = 1\nmax_items = 2", "max_items is given twice"),
        ("api_keys = []", "api_keys: got [], takes at least one key"),
    ],
)
def test_a_wrong_file_is_one_line(config, text, says):
    path = config(text)
    with pytest.raises(StartupError) as wrong:
        load_settings({"config": path})
    assert str(wrong.value).startswith(f"{path}: {says}") and "\n" not in str(wrong.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(StartupError, match=r"none\.toml: no such file or directory"):
        load_settings({"config": str(tmp_path / "none.toml")})


def test_no_complaint_shows_a_key(config):
    with pytest.raises(StartupError) as wrong:
        load_settings({"config": config('api_keys = ["secret", 5]')})
    assert "secret" not in str(wrong.value)


def test_unknown_variables_are_named_without_their_values(monkeypatch):
    monkeypatch.setenv("ENCODE_SERVER_PREPROC_WORKER", "secret")
    monkeypatch.setenv("ENCODE_SERVER_NONSENSE", "secret")
    monkeypatch.setenv("ENCODE_SERVER_TP", "1")
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_30000_TCP", "PORT_30000_TCP_ADDR"):
        monkeypatch.setenv(f"ENCODE_SERVER_{name}", "x")  # Kubernetes, for a Service called encode-server
    assert unknown_variables() == [
        "the variable ENCODE_SERVER_NONSENSE is no option",
        "the variable ENCODE_SERVER_PREPROC_WORKER is no option, did you mean ENCODE_SERVER_PREPROC_WORKERS?",
    ]


def test_a_port_that_kubernetes_set_is_explained(monkeypatch):
    monkeypatch.setenv("ENCODE_SERVER_PORT", "tcp://10.0.0.1:30000")
    with pytest.raises(StartupError, match=r"ENCODE_SERVER_PORT: got 'tcp://10.* enableServiceLinks: false"):
        load_settings()


def test_redacted_settings_hold_no_secret():
    shown = redacted(
        load_settings({"api_keys": "secret,hidden", "register_url": "http://user:secret@10.0.0.7:8997/x?token=hidden"})
    )
    assert shown["api_keys"] == 2 and shown["register_url"] == ["http://10.0.0.7:8997/x"]
    assert "secret" not in str(shown) and "hidden" not in str(shown)
