"""How much memory a decode takes, known before it begins."""

from __future__ import annotations

from encode_server.media.limits import MediaLimits
from encode_server.wire.modality import Modality


def decoded_bytes(
    modality: Modality, data: bytes, limits: MediaLimits, *, most_frames: int | None = None, sampling_rate: int = 16_000
) -> int:
    """The most bytes that decoding `data` holds at any moment beside `data` itself, from its header alone.

    `most_frames`: frames that the video processor chooses at most. `sampling_rate`: what audio is resampled to (Hz).

    An image's figure holds: the decode uses the same header. The headers of videos and of audio in MP4 or Matroska can
    be wrong; `limits` bounds what such files take.

    Raises `BadMedia` and `TooLarge` for what the header shows already.
    """
    if modality is Modality.IMAGE:
        from encode_server.media.image import image_bytes

        return image_bytes(data, limits)
    if modality is Modality.VIDEO:
        from encode_server.media.video import video_bytes

        return video_bytes(data, most_frames, limits)
    from encode_server.media.audio import audio_bytes

    return audio_bytes(data, sampling_rate, limits)
