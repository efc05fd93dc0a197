"""What a forkserver of the tests imports: next to nothing, so that it is there in a tenth of a second."""

from __future__ import annotations


def nothing(argument: bytes) -> None:
    """Import no torch."""
    import tests.prepare.fake_worker  # noqa: F401
