"""The pages say what is true: options, errors, names of functions, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from encode_server.errors import EncodeError, NoRoute
from encode_server.settings import RENAMED, Settings, option_name
from tests.options_table import CONFIGURATION, mended, row_of, rows_in

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as they are made from the text."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_option_has_one_row_with_its_default_and_help(name):
    assert rows_in(CONFIGURATION.read_text()).get(option_name(name)) == [row_of(name)]


def test_the_tables_hold_nothing_else():
    text = CONFIGURATION.read_text()
    assert set(rows_in(text)) == {option_name(name) for name in Settings.model_fields}
    assert all(f"`{option_name(old)}` is called `{option_name(new)}`" in text for old, new in RENAMED.items())


def test_mending_the_tables_restores_them():
    text = CONFIGURATION.read_text()
    broken = text.replace(row_of("tp") + "\n", "").replace(row_of("host"), "| `--host` | `nowhere` | |")
    assert mended(text) == text == mended(broken.replace("| `--port`", "| `--gone` | none | |\n| `--port`"))


def test_every_error_is_listed_with_its_status():
    rows = re.findall(r"^\| ([\d, ]+) \| (.+?) \|", (ROOT / "docs" / "http-api.md").read_text(), re.MULTILINE)
    listed = {(code, status) for statuses, codes in rows for code in codes.split(", ") for status in [statuses]}
    for kind in [EncodeError, *EncodeError.__subclasses__()]:
        if kind is not NoRoute:
            assert (f"`{kind.code}`", str(kind.status)) in listed, kind.__name__


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_functions_that_are_named_exist(page):
    for file, name in re.findall(r"`([a-z_/]+\.py):(\w+)`", page.read_text()):
        source = (ROOT / "encode_server" / file).read_text()
        assert re.search(rf"^\s*(?:async )?(?:def|class) {name}\b", source, re.MULTILINE), f"{file} has no {name}"


def test_structure_names_every_room():
    text = (ROOT / "docs" / "structure.md").read_text()
    package = ROOT / "encode_server"
    rooms = [f"`{path.name}/`" for path in package.iterdir() if (path / "__init__.py").exists()]
    files = [f"`{path.name}`" for path in package.glob("*.py") if path.name != "__init__.py"]
    assert [room for room in rooms + files if room not in text] == []


def test_constraints_name_no_address_and_pin_what_is_needed():
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text and " @ " not in text
    pinned = re.findall(r"^([a-z0-9-]+)==", text, re.MULTILINE)
    assert {"torch", "transformers", "fastapi", "starlette", "pytest", "ruff", "mypy", "import-linter"} <= set(pinned)
    assert text.count("--hash=sha256:") >= len(pinned)
