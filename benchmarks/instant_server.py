"""`encode-server` with `benchmarks.instant_rank` in the ranks' place, and all else as it is: same command line."""

from __future__ import annotations

import sys

from benchmarks import instant_rank
from encode_server import cli
from encode_server.engine import group


def main() -> int:
    """Run the command."""
    group.ENTRY = f"{instant_rank.__name__}:main"
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
