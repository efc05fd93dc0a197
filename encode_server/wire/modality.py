"""The three kinds of media an encoder takes."""

from enum import StrEnum


class Modality(StrEnum):
    """A kind of media. The value is the name used in requests, messages and metrics."""

    IMAGE = "image"
    VIDEO = "video"
    AUDIO = "audio"
