"""The option tables of docs/configuration.md, from settings.py. Run as `python -m tests.options_table` to mend them."""

from __future__ import annotations

from pathlib import Path

from encode_server.settings import Settings, option_name

CONFIGURATION = Path(__file__).parent.parent / "docs" / "configuration.md"


def row_of(name: str) -> str:
    """The table row of the setting `name`."""
    field = Settings.model_fields[name]
    value = field.default
    shown = ",".join(value) if isinstance(value, tuple) else "" if value is None else str(value).lower()
    return f"| `{option_name(name)}` | {f'`{shown}`' if shown else 'none'} | {field.description} |"


def rows_in(text: str) -> dict[str, list[str]]:
    """The rows of `text` by the option that they describe."""
    rows: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("| `--"):
            rows.setdefault(line.split("`")[1], []).append(line)
    return rows


def mended(text: str) -> str:
    """`text` with each option's row as it has to be, once. A new option's row follows the row of the option before it
    in settings.py, in the same group."""
    lines = text.splitlines()
    options = {option_name(name): name for name in Settings.model_fields}
    lines = [line for line in lines if not (line.startswith("| `--") and line.split("`")[1] not in options)]
    last = 0
    for option, name in options.items():
        at = next((i for i, line in enumerate(lines) if line.startswith(f"| `{option}` |")), None)
        if at is None:
            at = last + 1
            lines.insert(at, "")
        lines[at] = row_of(name)
        last = at
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    CONFIGURATION.write_text(mended(CONFIGURATION.read_text()))
