"""One media item through the checkpoint's own processor: the tensors its features method takes, and its tokens."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from encode_server.errors import StartupError, first_line
from encode_server.models.checkpoint import Checkpoint
from encode_server.models.generic import windows
from encode_server.models.generic.classes import ModelClass, placeholders
from encode_server.models.processors import class_defaults, settle
from encode_server.wire.modality import Modality

_MEDIA = {Modality.IMAGE: "images", Modality.VIDEO: "videos", Modality.AUDIO: "audio"}
"""Names of a processor's arguments for the media."""
_KWARGS = {Modality.IMAGE: "images_kwargs", Modality.VIDEO: "videos_kwargs", Modality.AUDIO: "audio_kwargs"}
"""Names of its arguments for options."""
_PARTS = {
    Modality.IMAGE: ("image_processor",),
    Modality.VIDEO: ("video_processor",),
    Modality.AUDIO: ("feature_extractor", "audio_processor"),
}
_TEXT = frozenset(
    (
        *("input_ids", "attention_mask", "position_ids", "labels"),
        *("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"),
    )
)
"""What a processor makes of the text rather than of the media."""


Attempt = tuple[str | None, dict[str, Any]]
"""A prompt, None for the processor's own, and options beside the caller's."""


@dataclass(frozen=True)
class Processed:
    """One item. `tensors`: by the names of the processor. `tokens`: placeholders of `token` in the prompt. `prompt`:
    the text's tensors, as the whole model takes them. `taken_by_encoder`: names of the tensors that an encoder may
    want."""

    tensors: dict[str, torch.Tensor]
    tokens: int
    token: int
    prompt: dict[str, torch.Tensor]
    taken_by_encoder: frozenset[str]

    def taken(self) -> dict[str, torch.Tensor]:
        """The tensors that an encoder may want."""
        return {name: tensor for name, tensor in self.tensors.items() if name in self.taken_by_encoder}


class MediaProcessor:
    """The checkpoint's processor, given a prompt that consists of one placeholder. Safe from many threads."""

    def __init__(self, checkpoint: Checkpoint, found: ModelClass) -> None:
        """`found`: the model's class; its configuration names the placeholders.

        Raises:
            StartupError: the processor or its tokenizer is missing, unreadable, or needs a package that is.
        """
        self._processor = load_processor(checkpoint)
        self._config = found.config
        self._taken = {modality: found.names(modality) for modality in Modality}
        self._worked: dict[Modality, Attempt] = {}
        for modality in Modality:
            if (part := self.part(modality)) is not None:
                settle(part, class_defaults(type(self._processor), modality))
        _serialise(self._processor)

    def part(self, modality: Modality) -> Any:
        """The image processor, video processor or feature extractor, or None."""
        for name in _PARTS[modality]:
            if (part := getattr(self._processor, name, None)) is not None:
                return part
        return None

    def __call__(self, modality: Modality, media: Any, options: Mapping[str, Any]) -> Processed:
        """`media`: an RGB image, frames uint8 [n, height, width, 3], or mono samples float32 at the extractor's rate.

        `options`: keyword arguments for the part that handles this modality.

        Raises:
            ValueError: the processor refuses the item.
        """
        if modality is Modality.AUDIO and windows.wanted(self._processor):
            tensors, tokens = windows.split(self.part(modality), self._config, media)
            [token] = placeholders(self._config, modality)
            prompt = {"input_ids": torch.full((1, tokens), token)}
            return Processed(tensors, tokens, token, prompt, self._taken[modality])
        failure: ValueError | None = None
        single: Processed | None = None
        for attempt in self._attempts(modality):
            text, more = attempt
            try:
                output = self._processor(
                    **({} if text is None else {"text": [text]}),
                    **{_MEDIA[modality]: [media], _KWARGS[modality]: {**options, **more}},
                    return_tensors="pt",
                )
                ids = output["input_ids"].flatten()
            except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, StopIteration) as error:
                failure = failure or ValueError(first_line(error))  # of the likeliest prompt
                continue
            for token in placeholders(self._config, modality):
                if not (count := int((ids == token).sum())):
                    continue
                found = Processed(_media_tensors(output), count, token, _prompt(output), self._taken[modality])
                if count > 1:
                    self._worked[modality] = attempt
                    return found
                # A single placeholder may be the prompt's: a processor that makes prompts by itself does not expand it.
                single = single or found
                break
            else:
                failure = failure or ValueError(
                    f"the processor puts no {modality} placeholder of the model in its prompt"
                )
        if single is not None:
            return single
        raise failure or ValueError(f"the processor has no {modality} placeholder")

    def _attempts(self, modality: Modality) -> list[Attempt]:
        """Prompts and further options, what worked before first, then the likeliest."""
        attempts: list[Attempt] = [(text, {}) for text in self._prompts(modality)]
        if modality is Modality.VIDEO:
            # Some processors need the metadata for the prompt, and leave it to their callers to ask for them.
            attempts += [(text, {"return_metadata": True}) for text, _ in attempts]
        # Processors that make the prompt themselves, or put the placeholders before any text.
        attempts += [(None, {}), ("", {})]
        if (worked := self._worked.get(modality)) is not None:
            attempts.insert(0, worked)
        return attempts

    def _prompts(self, modality: Modality) -> list[str]:
        """Prompts of one placeholder, the likeliest first: families name theirs in several ways."""
        processor, tokenizer = self._processor, self._processor.tokenizer
        begins = {Modality.IMAGE: "boi_token", Modality.AUDIO: "boa_token", Modality.VIDEO: "boi_token"}
        named = [
            getattr(owner, name, None)
            for name in (f"{modality}_token", begins[modality])
            for owner in (processor, tokenizer)
        ]
        plain = list(dict.fromkeys(name for name in named if isinstance(name, str)))
        # GLM uses one placeholder for images and videos, and tells them apart by what stands around.
        ends = [getattr(self._config, f"{modality}_{end}_token_id", None) for end in ("start", "end")]
        if modality is Modality.VIDEO and all(isinstance(end, int) for end in ends):
            start, end = tokenizer.convert_ids_to_tokens(ends)
            return [*(f"{start}{name}{end}" for name in plain), *plain]
        return plain


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's processor, tokenizer included.

    Raises:
        StartupError: missing, unreadable, or in need of a package that is not installed.
    """
    from transformers.models.auto.processing_auto import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(str(checkpoint.path), local_files_only=True)
    except Exception as error:  # Processors are built from five files by many classes.
        raise StartupError(f"model {checkpoint.name!r}: its processor cannot be loaded: {first_line(error)}") from error
    if not hasattr(processor, "tokenizer"):
        raise StartupError(f"model {checkpoint.name!r}: its processor cannot be loaded: the tokenizer is missing")
    return processor


def video_options(metadata: Any) -> dict[str, Any]:
    """A video processor's options for frames that were chosen already. `metadata`: transformers' VideoMetadata."""
    return {"video_metadata": [metadata], "do_sample_frames": False, "input_data_format": "channels_last"}


def _serialise(processor: Any) -> None:
    """Let one thread at a time into the tokenizer, whose settings are changed by every call."""
    lock, tokenizer = threading.Lock(), processor.tokenizer

    class Serialised(type(tokenizer)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with lock:
                return super().__call__(*args, **kwargs)

    Serialised.__name__ = type(tokenizer).__name__
    tokenizer.__class__ = Serialised


def _media_tensors(output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, value in output.items():
        if name in _TEXT:
            continue
        try:
            tensor = torch.as_tensor(np.array(value) if isinstance(value, list) else value)
        except (TypeError, ValueError, RuntimeError):
            continue  # metadata
        tensors[name] = tensor.contiguous()
    return tensors


def _prompt(output: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if name in _TEXT and isinstance(value, torch.Tensor)}
