"""What bounds a profile, for the rank that records and the front that tells."""

from __future__ import annotations

MAX_SECONDS = 60.0
MAX_BYTES = 32 << 20  # of memory while it records: 150,000 events, which take the rank a second once it ends
PART = ".part"  # the end of the name of a trace that is not complete
