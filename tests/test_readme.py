"""The README says what is true: every option with its default, and the commands it opens with."""

from pathlib import Path

import pytest

from encode_server.settings import Settings, option_name

README = Path(__file__).parent.parent.joinpath("README.md").read_text()


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_option_is_listed_with_its_default_and_help(name):
    rows = [line for line in README.splitlines() if line.startswith(f"| `{option_name(name)}` |")]
    assert len(rows) == 1, f"{option_name(name)} has {len(rows)} rows in the README's table"
    _, _, default, help_text, _ = rows[0].split("|")
    expected = Settings.model_fields[name].default
    shown = ",".join(expected) if isinstance(expected, tuple) else "" if expected is None else str(expected).lower()
    assert default.strip() == (f"`{shown}`" if shown else "none"), name
    assert help_text.strip() == Settings.model_fields[name].description


def test_the_two_commands_open_it():
    assert "pip install uv && uv run encode-server demo" in README
    assert "pip install uv && uv run pytest" in README
