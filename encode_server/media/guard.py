"""One rule for every decoder: bytes that cannot be decoded are the caller's error, whatever the library raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from encode_server.errors import BadMedia, EncodeError, TooLarge


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Turn whatever a decoding library raises inside the block into `BadMedia` or `TooLarge`.

    `what` names the medium in the message. The library's own words stay in the exception's cause: they can hold object
    addresses and paths.
    """
    try:
        yield
    except EncodeError:
        raise
    except MemoryError as error:
        raise TooLarge(f"decoding the {what} needs more memory than there is") from error
    except Exception as error:
        # Decoders meet hostile bytes with anything from OSError to struct.error, so the list can't be shorter.
        raise BadMedia(f"the {what} is damaged, cut short, or in a format that is not supported") from error
