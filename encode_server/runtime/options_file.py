"""The TOML file of options: `preproc_workers = 8` or `preproc-workers = 8`, one a line, no tables."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from encode_server.errors import StartupError


def read_config(path: str, fields: Iterable[str]) -> dict[str, Any]:
    """The options of a file, by field name.

    Raises StartupError, in one line, for a file that cannot be read, for a key that is none of `fields`, and for a key
    that is given twice.
    """
    try:
        document = tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise StartupError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StartupError(f"{path}: not TOML: {error}") from None
    known, options = set(fields), {}
    for key, value in document.items():
        field = key.replace("-", "_")
        if field not in known:
            raise StartupError(f"{path}: {key} is no option{suggestion(field, known)}")
        if field in options:
            raise StartupError(f"{path}: {field} is given twice")
        options[field] = value
    return options


def suggestion(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`, did you mean X?` where one of `known` is like the name, else nothing. `prefix`: shown before X."""
    close = difflib.get_close_matches(name, known, 1)
    return f", did you mean {prefix}{close[0]}?" if close else ""
