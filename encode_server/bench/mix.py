"""What a load consists of: which media, how many in a request, how often each, and how much of it is seen again."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encode_server.errors import StartupError

FIELDS = {"media", "items", "weight"}


@dataclass(frozen=True)
class Share:
    """Requests of one kind. `media`: the side of square JPEGs in pixels, `video` or `audio`. `items`: of them in a
    request. `weight`: how often such a request comes, against the others."""

    media: str
    items: int = 1
    weight: float = 1.0


@dataclass(frozen=True)
class Mix:
    """`repeat`: the part of the requests, 0 to 1, whose media were sent before, so that a cache may know them."""

    shares: tuple[Share, ...]
    repeat: float = 0.0

    @property
    def items_per_request(self) -> float:
        """Media in a request, on average."""
        return sum(share.items * share.weight for share in self.shares) / sum(share.weight for share in self.shares)

    def document(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        shares = [{"media": share.media, "items": share.items, "weight": share.weight} for share in self.shares]
        return {"repeat": self.repeat, "request": shares}


def mix_of(media: str, items: int) -> Mix:
    """The mix that `--media A,B` and `--items N` stand for."""
    return Mix(tuple(Share(what.strip(), items) for what in media.split(",")))


def mix_from(document: Any, where: str) -> Mix:
    """A mix from plain data: `repeat`, and a list `request` of tables with `media`, `items`, `weight`. Raises
    StartupError naming `where` the data came from."""
    tables = document.get("request") if isinstance(document, dict) else None
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise StartupError(
            f'{where}: takes tables [[request]], each with media = "448", and items and weight if wanted'
        )
    shares = []
    for table in tables:
        if unknown := table.keys() - FIELDS:
            raise StartupError(f"{where}: {sorted(unknown)[0]} is no field of [[request]], takes media, items, weight")
        share = Share(str(table.get("media", "")), table.get("items", 1), table.get("weight", 1.0))
        if not isinstance(share.items, int) or share.items < 1:
            raise StartupError(f"{where}: items takes a whole number above zero, got {share.items!r}")
        if not isinstance(share.weight, int | float) or not 0 < share.weight < math.inf:
            raise StartupError(f"{where}: weight takes a number above zero, without quotes, got {share.weight!r}")
        shares.append(share)
    repeat = document.get("repeat", 0.0)
    if not isinstance(repeat, int | float) or not 0 <= repeat < 1:
        raise StartupError(f"{where}: repeat takes a part from 0 to below 1")
    return Mix(tuple(shares), float(repeat))


def read_mix(path: Path) -> Mix:
    """The mix in a TOML file. Raises StartupError."""
    try:
        return mix_from(tomllib.loads(path.read_text()), str(path))
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise StartupError(f"{path} is no TOML: {error}") from None
