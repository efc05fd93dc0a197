"""The metrics of many servers as one text."""

from __future__ import annotations

from collections.abc import Mapping


def merged(texts: Mapping[str, str]) -> str:
    """Prometheus' text format of several servers in one: each family once, each series with the label `replica`, whose
    value is the server's key in `texts`."""
    comments: dict[str, list[str]] = {}
    series: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in text.splitlines():
            if line.startswith("# "):
                family = line.split(" ", 3)[2]
                if line not in comments.setdefault(family, []):
                    comments[family].append(line)
            elif line:
                series.setdefault(family, []).append(_labelled(line, replica))
    return "".join(f"{line}\n" for family in series for line in (*comments.get(family, ()), *series[family]))


def _labelled(line: str, replica: str) -> str:
    """One series with one more label. Only a label's value may hold a space or a brace before the number does."""
    label = f'replica="{replica}"'
    name, brace, rest = line.partition("{")
    if brace and " " not in name:
        return f"{name}{{{label},{rest}"
    name, _, value = line.partition(" ")
    return f"{name}{{{label}}} {value}"
