"""Names that tell a receiver something."""

from __future__ import annotations

PUSHED_PREFIX = "es-"
"""Of the identifier of an embedding that is pushed before the request that needs it: worth a short wait."""

PLACED_PREFIX = PUSHED_PREFIX + "p-"
"""The same, of an embedding whose request may hold metadata in place of the media: nothing else can make it."""
