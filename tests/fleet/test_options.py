"""The page on fleets names every option of `route`, with its default."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from encode_server.errors import StartupError
from encode_server.route.options import RouteOptions

PAGE = Path(__file__).parent.parent.parent / "docs" / "fleet.md"


def test_a_transport_without_a_destination_is_refused():
    with pytest.raises(StartupError, match="--engine-receives"):
        RouteOptions(engine_url="http://e:1", encoder_url=("http://x:1",), engine_transport="nixl")


def test_every_option_is_in_the_table():
    table = [line for line in PAGE.read_text().splitlines() if line.startswith("| `--")]
    named = {name.replace("-", "_"): line for line in table for name in re.findall(r"`--([a-z-]+)`", line)}
    assert {field.name for field in fields(RouteOptions)} == named.keys()
    for field in fields(RouteOptions):
        if isinstance(field.default, int | float) and field.name != "port":
            assert f"`{field.default:g}`" in named[field.name], named[field.name]
