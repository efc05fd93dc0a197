"""Opens video and audio containers with PyAV, limited to the formats and decoders named here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import av

from encode_server.errors import BadMedia
from encode_server.media.boxes import check_boxes
from encode_server.media.limits import MediaLimits

# Self-contained formats only: playlists (hls, dash, concat, sdp) make FFmpeg open other files and addresses.
FORMATS = (
    *("mov", "matroska", "avi", "gif", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg", "h264", "hevc", "ivf"),
    *("aac", "mp3", "flac", "wav", "w64", "aiff", "caf", "amr", "ac3", "eac3", "au"),
)
VIDEO_DECODERS = frozenset(
    (
        *("av1", "libdav1d", "ffv1", "flv", "gif", "h263", "h264", "hevc", "libvpx", "libvpx-vp9", "mjpeg"),
        *("mpeg1video", "mpeg2video", "mpeg4", "msmpeg4", "msmpeg4v2", "png", "prores", "rawvideo", "theora"),
        *("vc1", "vp8", "vp9", "wmv1", "wmv2", "wmv3"),
    )
)
AUDIO_DECODERS = frozenset(
    (
        *("aac", "ac3", "eac3", "alac", "amrnb", "amrwb", "flac", "libopencore_amrnb", "libopus", "mp2"),
        *("mp2float", "mp3", "mp3float", "opus", "vorbis", "wmav1", "wmav2", "adpcm_ima_qt", "adpcm_ima_wav"),
        *("adpcm_ms", "pcm_alaw", "pcm_mulaw", "pcm_u8", "pcm_s8", "pcm_s16le", "pcm_s16be", "pcm_s24le"),
        *("pcm_s24be", "pcm_s32le", "pcm_s32be", "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be"),
    )
)


@contextmanager
def open_container(data: bytes, limits: MediaLimits) -> Iterator[Any]:
    """Open `data` as an `av.container.InputContainer` of one of `FORMATS`; it is closed after the block.

    Raises `av.error.FFmpegError` for any other format, `TooLarge` or `BadMedia` for an MP4 or MOV file that declares
    more than it may or can hold.
    """
    check_boxes(data, limits)
    options = {
        "format_whitelist": ",".join(FORMATS),
        "codec_whitelist": ",".join(sorted(VIDEO_DECODERS | AUDIO_DECODERS)),
        "protocol_whitelist": "none",
        "max_streams": "32",
        # FFmpeg also decodes frames while it opens a file.
        "max_pixels": str(limits.max_pixels),
    }
    # Metadata is not used, so text in an unknown encoding must not be an error.
    with av.open(BytesIO(data), options=options, metadata_errors="replace") as container:
        yield container


def pick_stream(container: Any, kind: str, decoders: frozenset[str]) -> Any:
    """The first stream of `kind` ("video" or "audio") that is not a cover image. Its decoder must be in `decoders`.

    Raises `BadMedia` if there is no such stream, or its decoder is another.
    """
    for stream in container.streams:
        if stream.type != kind or stream.disposition & av.stream.Disposition.attached_pic:
            continue
        if stream.codec_context is None or stream.codec_context.codec.name not in decoders:
            raise BadMedia(f"the {kind} has a codec that is not supported")
        return stream
    raise BadMedia(f"the media holds no {kind}")
