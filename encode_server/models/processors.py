"""Loading single processors of a checkpoint."""

from __future__ import annotations

from typing import Any

from encode_server.errors import StartupError, first_line
from encode_server.models.checkpoint import Checkpoint
from encode_server.wire.modality import Modality


def load_part(checkpoint: Checkpoint, modality: Modality) -> Any:
    """The image processor, video processor or feature extractor of `checkpoint`.

    Raises:
        StartupError: it is missing or unreadable.
    """
    if modality is Modality.IMAGE:
        from transformers.models.auto.image_processing_auto import AutoImageProcessor as Auto
    elif modality is Modality.VIDEO:
        from transformers.models.auto.video_processing_auto import AutoVideoProcessor as Auto
    else:
        from transformers.models.auto.feature_extraction_auto import AutoFeatureExtractor as Auto
    try:
        return Auto.from_pretrained(str(checkpoint.path), local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise StartupError(
            f"model {checkpoint.name!r}: its {modality} processor cannot be loaded: {first_line(error)}"
        ) from error
