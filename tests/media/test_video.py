import struct
import tracemalloc
from collections.abc import Callable, Sequence

import av
import numpy as np
import pytest
from PIL import Image

from encode_server.errors import BadMedia, BadRequest, TooLarge
from encode_server.media.limits import MediaLimits
from encode_server.media.video import VideoInfo, decode_video

from .samples import VIDEO_KINDS, image_bytes, picture, plain_frames, sound_bytes, video_bytes

LIMITS = MediaLimits()


def every(info: VideoInfo) -> range:
    return range(info.total_num_frames)


def always(*indices: int) -> Callable[[VideoInfo], Sequence[int]]:
    return lambda info: indices


@pytest.mark.parametrize(("format", "codec"), VIDEO_KINDS)
def test_chosen_frames_are_those_of_a_full_decode(format: str, codec: str) -> None:
    data = video_bytes(format, codec)
    full = plain_frames(data)
    frames, info = decode_video(data, every, LIMITS)
    assert np.array_equal(frames, full)
    assert (info.total_num_frames, info.width, info.height) == (24, 64, 48)
    assert info.fps == pytest.approx(12, rel=0.05)
    assert info.duration == pytest.approx(2, abs=0.1)
    some, _ = decode_video(data, always(17, 3, 3, 23, 0), LIMITS)
    assert np.array_equal(some, full[[17, 3, 3, 23, 0]])


def test_b_frames_come_in_display_order() -> None:
    data = video_bytes(options={"bf": "3", "b-pyramid": "normal", "g": "8"}, frames=30)
    full = plain_frames(data)
    frames, _ = decode_video(data, always(*range(29, -1, -1)), LIMITS)
    assert np.array_equal(frames, full[::-1])


def test_a_variable_frame_rate_keeps_every_frame() -> None:
    times = [0, 40, 80, 500, 520, 540, 1500, 1600, 1610, 2900]
    data = video_bytes("matroska", frames=10, times=times)
    frames, info = decode_video(data, every, LIMITS)
    assert np.array_equal(frames, plain_frames(data))
    assert len(frames) == 10
    assert info.duration == pytest.approx(2.9, abs=0.2)


def test_a_stream_that_starts_in_mid_air_is_counted_by_its_decode() -> None:
    data = video_bytes("mpegts", "libx264", frames=48, options={"g": "16", "bf": "2"})
    cut = data[188 * (len(data) // 188 // 4) :]
    full = plain_frames(cut)
    assert 0 < len(full) < 48
    totals = []

    def choose(info: VideoInfo) -> range:
        totals.append(info.total_num_frames)
        return every(info)

    frames, info = decode_video(cut, choose, LIMITS)
    assert np.array_equal(frames, full)
    assert info.total_num_frames == totals[-1] == len(full)


def test_hidden_frames_are_not_counted() -> None:
    options = {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "4"}
    data = video_bytes("webm", "libvpx", frames=48, options=options)
    frames, info = decode_video(data, every, LIMITS)
    assert info.total_num_frames == 48
    assert np.array_equal(frames, plain_frames(data))


def rotated(data: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """The MP4 with this display matrix in its track header."""
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    return data[:at] + struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30) + data[at + 36 :]


@pytest.mark.parametrize(
    ("matrix", "turns"), [((1, 0, 0, 1), 0), ((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)]
)
def test_a_phone_s_rotation_is_applied(matrix: tuple[int, int, int, int], turns: int) -> None:
    halves = Image.new("RGB", (64, 48))
    halves.paste("white", (0, 0, 32, 48))
    data = rotated(video_bytes(frames=4, images=[halves] * 4), *matrix)
    frames, info = decode_video(data, every, LIMITS)
    assert (info.width, info.height) == ((48, 64) if turns % 2 else (64, 48))
    assert np.array_equal(frames, np.rot90(plain_frames(data), turns, axes=(1, 2)))
    if turns == -1:
        # The camera lay on its side: what it saw on the left belongs on top.
        assert frames[0, :24].mean() > 200 > 50 > frames[0, -24:].mean()


def test_a_single_picture_gif_is_a_video_of_one_frame() -> None:
    frames, info = decode_video(image_bytes("GIF", picture(64, 48)), every, LIMITS)
    assert frames.shape == (1, 48, 64, 3)
    assert info.total_num_frames == 1
    assert info.fps > 0


def test_what_the_chooser_raises_is_the_caller_s_and_wrong_indices_are_a_bug() -> None:
    data = video_bytes(frames=4)

    def refuse(info: VideoInfo) -> Sequence[int]:
        raise BadRequest("no such option")

    with pytest.raises(BadRequest):
        decode_video(data, refuse, LIMITS)
    for indices in ((), (4,), (-1,)):
        with pytest.raises(ValueError, match="indices"):
            decode_video(data, always(*indices), LIMITS)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (MediaLimits(max_pixels=64 * 48 - 1), "64 x 48"),
        (MediaLimits(max_frames=23), "23 frames"),
        (MediaLimits(max_video_seconds=1.5), "1.5 s"),
        (MediaLimits(max_decoded_bytes=100_000), "fewer frames"),
        (MediaLimits(max_bytes=100), "100 bytes"),
        (MediaLimits(decode_seconds=0), "0 s"),
    ],
)
def test_each_limit_is_named(limits: MediaLimits, words: str) -> None:
    with pytest.raises(TooLarge, match=words):
        decode_video(video_bytes(), every, limits)


def test_decoding_goes_on_where_a_library_has_turned_logging_on() -> None:
    """FFmpeg logs from its threads; with PyAV's log level set, each line waits for the interpreter lock."""
    data = bytearray(video_bytes(frames=60))
    at = data.index(b"mdat")
    for position in range(at + 100, at + 2000, 50):
        data[position] ^= 0xFF
    before = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    try:
        for _ in range(20):
            try:
                decode_video(bytes(data), every, LIMITS)
            except BadMedia:
                pass
    finally:
        av.logging.set_level(before)


def test_a_long_video_costs_no_more_memory_than_its_chosen_frames() -> None:
    data = video_bytes(frames=600, size=(64, 48))
    tracemalloc.start()  # numpy tells it of its arrays
    try:
        frames, info = decode_video(data, always(0, 599), LIMITS)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (frames.shape, info.total_num_frames) == ((2, 48, 64, 3), 600)
    assert most < 100 * frames[0].nbytes


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(1000),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n",
    ],
)
def test_playlists_and_rubbish_are_no_video(data: bytes) -> None:
    with pytest.raises(BadMedia):
        decode_video(data, every, LIMITS)


def test_sound_alone_and_a_header_without_its_end_are_no_video() -> None:
    with pytest.raises(BadMedia, match="holds no video"):
        decode_video(sound_bytes(), every, LIMITS)
    data = video_bytes()
    with pytest.raises(BadMedia):
        decode_video(data[: len(data) // 2], every, LIMITS)
