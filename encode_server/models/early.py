"""What the front can say of a checkpoint by itself, before any process is started."""

from __future__ import annotations

from pathlib import Path

from encode_server.models.registry import check_tp, known, summarize
from encode_server.models.resolve import names_a_path, resolve


def refuse_early(model: str, tp: int) -> None:
    """Raise StartupError for what this machine's files alone show to be wrong, before any process is started.

    Imports neither torch nor a media decoder. `models.inspect` says the rest.
    """
    if model != "demo" and (names_a_path(model) or Path(model).is_dir()):
        checkpoint = resolve(model)
        if known(checkpoint) is not None:
            check_tp(summarize(checkpoint), tp)
