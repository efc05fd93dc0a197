"""What the front can say of a checkpoint by itself, before any process is started."""

from __future__ import annotations

from pathlib import Path

from encode_server.models.checkpoint import resolve
from encode_server.models.registry import check_tp, known, summarize


def refuse_early(model: str, tp: int) -> None:
    """Raise StartupError for what this machine's files alone show to be wrong, before any process is started.

    Imports neither torch nor a media decoder. `models.inspect` says the rest.
    """
    local = Path(model).expanduser()
    if model != "demo" and (
        local.is_dir() or local.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    ):
        checkpoint = resolve(model)
        if known(checkpoint) is not None:
            check_tp(summarize(checkpoint), tp)
