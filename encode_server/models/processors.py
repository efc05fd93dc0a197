"""Loading single processors of a checkpoint, with the settings that its whole processor would give them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from encode_server.errors import StartupError, first_line
from encode_server.models.checkpoint import Checkpoint
from encode_server.wire.modality import Modality

_ARGUMENTS = {Modality.IMAGE: "images_kwargs", Modality.VIDEO: "videos_kwargs", Modality.AUDIO: "audio_kwargs"}
_NAMED_IN = (
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    "tokenizer_config.json",
)
"""Files that may name the class of the whole processor, in the order in which AutoProcessor reads them."""


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
        part = Auto.from_pretrained(str(checkpoint.path), local_files_only=True)
        settle(part, class_defaults(_processor_class(checkpoint), modality))
        return part
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise StartupError(
            f"model {checkpoint.name!r}: its {modality} processor cannot be loaded: {first_line(error)}"
        ) from error


def class_defaults(processor_class: Any, modality: Modality) -> dict[str, Any]:
    """What a processor's class passes to its part at every call, over the part's own settings.

    Qwen2.5-Omni's and Qwen3-Omni's classes set the size of videos this way, whatever the checkpoint's files say.
    """
    argument = _ARGUMENTS[modality]
    older = getattr(getattr(processor_class, "valid_processor_kwargs", None), "_defaults", {})
    return {**(getattr(processor_class, argument, None) or {}), **older.get(argument, {})}


def settle(part: Any, defaults: Mapping[str, Any]) -> None:
    """Make `defaults` the settings of `part` itself, so that whoever asks the part reads what will be used.

    Only settings that the part has: a class also passes arguments such as `return_tensors`.
    """
    for name, value in defaults.items():
        if hasattr(part, name):
            old = getattr(part, name)
            setattr(part, name, type(old)(**value) if name == "size" else value)


def _processor_class(checkpoint: Checkpoint) -> Any:
    """The class of the whole processor, which is not loaded: that would take the tokenizer's files. None: unknown."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    for file in _NAMED_IN:
        path = checkpoint.path / file
        if path.is_file() and (name := json.loads(path.read_bytes()).get("processor_class")):
            return getattr(transformers, name, None)
    return getattr(transformers, PROCESSOR_MAPPING_NAMES.get(checkpoint.model_type, ""), None)
