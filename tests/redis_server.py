"""Where a test needs a real Redis or Valkey."""

from __future__ import annotations

import pytest

from benchmarks.redis_server import PROGRAM

needs_redis = pytest.mark.skipif(PROGRAM is None, reason="neither redis-server nor valkey-server is installed")
