"""The load's media: unique bytes, one content."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from encode_server.bench import source
from encode_server.errors import StartupError
from encode_server.media import unique
from encode_server.media.audio import decode_audio
from encode_server.media.image import decode_image
from encode_server.media.limits import MediaLimits
from encode_server.media.video import decode_video


def decoded(medium, data):
    if medium.modality == "image":
        return np.asarray(decode_image(data, MediaLimits()))
    if medium.modality == "video":
        return decode_video(data, lambda info: range(info.total_num_frames), MediaLimits())[0]
    return decode_audio(data, 16_000, MediaLimits())


@pytest.mark.parametrize("make", [lambda: unique.jpeg(97, 61), unique.mp4, unique.wav], ids=["jpeg", "mp4", "wav"])
def test_copies_differ_in_bytes_and_not_in_content(make):
    medium = make()
    first, second = medium.copy(), medium.copy()
    assert first != second
    assert len(first) == len(second) == medium.nbytes
    assert np.array_equal(decoded(medium, first), decoded(medium, second))


@pytest.mark.parametrize("make", [lambda: unique.jpeg(64, 64), unique.mp4, unique.wav], ids=["jpeg", "mp4", "wav"])
def test_a_data_uri_holds_the_next_copy(make):
    medium = make()
    before, uri, after = medium.copy(), b"".join(medium.data_uri()), medium.copy()
    found = base64.b64decode(uri.partition(b",")[2], validate=True)
    counters = [int(copy.removeprefix(medium.head).removesuffix(medium.tail)) for copy in (before, found, after)]
    assert counters == [counters[0], counters[0] + 1, counters[0] + 2]


def test_pictures_are_seeded_and_differ():
    first, again, other = unique.jpeg(64, 64, 1), unique.jpeg(64, 64, 1), unique.jpeg(64, 64, 2)
    assert first.tail == again.tail != other.tail


def test_the_same_key_means_the_same_content():
    stream = source.requests(["32"])
    found = [next(stream) for _ in range(source.PICTURES + 1)]
    assert len({request.key for request in found}) == source.PICTURES
    assert found[0].key == found[-1].key
    assert b"".join(found[0].pieces) != b"".join(found[-1].pieces)


def test_a_mix_holds_every_kind():
    stream = source.requests(["32", "audio"])
    assert {next(stream).kind for _ in range(50)} == {"image 32x32", "sound"}


def test_what_cannot_be_sent_is_named():
    with pytest.raises(StartupError, match="'gif'"):
        source.requests(["gif"])
