"""Pickle programs that can stand inside another program. Pickle is written here, and never read."""

from __future__ import annotations

import io
import pickle
from typing import Any

PROTOCOL = 3
"""The last protocol without frames, so that one program can stand inside another."""


def program(value: Any) -> bytes:
    """The instructions that push `value` onto the unpickler's stack: the value's pickle without its head and its stop,
    and without a memo, whose keys would clash with those of other programs."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, PROTOCOL)
    pickler.fast = True
    pickler.dump(value)
    return out.getvalue()[2:-1]
