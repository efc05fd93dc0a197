"""Names that tell a receiver something."""

from __future__ import annotations

PUSHED_PREFIX = "es-"
"""Of the identifier of an embedding that is pushed before the request that needs it: worth a short wait."""
