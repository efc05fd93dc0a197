"""A value of the shared cache is read as it was written, or not at all."""

from __future__ import annotations

import dataclasses

import pytest

from encode_server.pipeline.cache import CacheKey
from encode_server.pipeline.shared.values import Garbled, Kind, key_of, pack, unpack
from encode_server.wire.embedding import EncodedItem
from encode_server.wire.frames import ItemInfo
from encode_server.wire.items import ItemOptions
from encode_server.wire.modality import Modality

KIND = Kind("f" * 64, "float32", 4)
KEY = CacheKey(Modality.VIDEO, "sha256:ab", ItemOptions(fps=2.0))
ITEM = EncodedItem(
    ItemInfo(3, [1, 2, 6], "sha256:ab"),
    {"second_per_grid_ts": 0.5, "video_timestamps": [0.25, 1]},
    memoryview(bytes(range(48))),
)


def value(key: str = "k", kind: Kind = KIND, item: EncodedItem = ITEM) -> bytearray:
    return bytearray(b"".join(pack(key, item, kind)))


def test_what_was_written_is_read():
    read = unpack("k", memoryview(value()), KIND)
    assert (read.info, read.extra, bytes(read.data)) == (ITEM.info, ITEM.extra, bytes(ITEM.data))


def test_the_rows_lie_where_any_dtype_may():
    assert (len(value()) - 48) % 64 == 0


@pytest.mark.parametrize("position", range(0, len(value()), 5))
def test_a_changed_byte_is_found(position):
    changed = value()
    changed[position] ^= 1
    with pytest.raises(Garbled):
        unpack("k", memoryview(changed), KIND)


@pytest.mark.parametrize("length", [0, 1, 11, 12, 60, 127, len(value()) - 1])
def test_a_value_cut_short_is_found(length):
    with pytest.raises(Garbled):
        unpack("k", memoryview(value()[:length]), KIND)


@pytest.mark.parametrize(
    "other",
    [value("j"), value(kind=Kind(KIND.fingerprint, "float16", 8)), b"x" * 4096, value() + b"\0"],
    ids=["key", "dtype", "noise", "more"],
)
def test_a_value_of_something_else_is_found(other):
    with pytest.raises(Garbled):
        unpack("k", memoryview(other), KIND)


def test_a_head_that_promises_other_rows_is_found():
    more = dataclasses.replace(ITEM, info=ItemInfo(4, None, "sha256:ab"))
    with pytest.raises(Garbled):
        unpack("k", memoryview(value(item=more)), KIND)


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (KEY, Kind("e" * 64, "float32", 4)),
        (KEY, Kind("f" * 64, "bfloat16", 4)),
        (KEY, Kind("f" * 64, "float32", 8)),
        (dataclasses.replace(KEY, modality=Modality.IMAGE), KIND),
        (dataclasses.replace(KEY, digest="sha256:ac"), KIND),
        (dataclasses.replace(KEY, options=ItemOptions(fps=2.5)), KIND),
    ],
    ids=["checkpoint", "dtype", "dim", "modality", "media", "options"],
)
def test_whatever_changes_the_rows_changes_the_key(key, kind):
    assert key_of(key, kind) != key_of(KEY, KIND)
