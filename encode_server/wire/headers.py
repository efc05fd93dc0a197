"""Headers of `POST /encode`, for the server and for those who call it."""

from __future__ import annotations

TIMEOUT_HEADER = "X-Encode-Timeout-S"
"""The request's deadline in seconds, for callers that set deadlines without touching bodies."""

ERRORS_HEADER = "X-Encode-Errors"
"""`answer`: an error goes into the answer alone, its destinations are not told: the caller may try elsewhere."""

QUIET = "answer"
