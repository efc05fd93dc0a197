"""Which class of transformers a checkpoint's configuration means, and what that class encodes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from encode_server.errors import StartupError, first_line
from encode_server.models.checkpoint import Checkpoint
from encode_server.wire.modality import Modality

_INNER = "thinker_config"
"""Where a model that also speaks keeps the configuration of the part that sees and hears."""


@dataclass(frozen=True)
class ModelClass:
    """What to load. `cls`: transformers' class. `config`: its configuration, as the checkpoint has it. `prefix`: what
    the checkpoint's keys begin with before the names that `cls` knows."""

    cls: Any
    config: Any
    prefix: str = ""

    def takes(self, modality: Modality) -> frozenset[str] | None:
        """Names of the tensors that the method of `features_method` takes; None where there is no such method."""
        name = self.features_method(modality)
        if name is None:
            return None
        methods = [getattr(cls, name) for cls in self._classes() if hasattr(cls, name)]
        # All of them: wrappers may hide arguments behind `*args`.
        names = {parameter for method in methods for parameter in inspect.signature(method).parameters}
        return frozenset(names) - {"self", "args", "kwargs"}

    def names(self, modality: Modality) -> frozenset[str]:
        """Names of the tensors that the features method of `modality` or the model's own forward takes."""
        return (self.takes(modality) or frozenset()) | frozenset(inspect.signature(self.cls.forward).parameters)

    def features_method(self, modality: Modality) -> str | None:
        """Name of the method that encodes `modality`, of the class or of the model inside. Some families encode the
        frames of a video as images."""
        kinds = [modality, Modality.IMAGE] if modality is Modality.VIDEO else [modality]
        for name in (f"get_{kind}_features" for kind in kinds):
            if any(hasattr(cls, name) for cls in self._classes()):
                return name
        return None

    def has_own(self, modality: Modality) -> bool:
        """Whether there is a features method for just this modality."""
        return any(hasattr(cls, f"get_{modality}_features") for cls in self._classes())

    def _classes(self) -> list[Any]:
        head = self.cls.__name__.removesuffix("ForConditionalGeneration").removesuffix("ForCausalLM")
        inner = vars(sys.modules[self.cls.__module__]).get(f"{head}Model")
        return [self.cls] if inner is None else [self.cls, inner]


def placeholders(config: Any, modality: Modality) -> list[int]:
    """Numbers of the tokens that the model replaces by embeddings of `modality`, the likeliest first."""
    kinds = [modality, Modality.IMAGE] if modality is Modality.VIDEO else [modality]
    names = [f"{kind}_{suffix}" for kind in kinds for suffix in ("token_id", "token_index", "patch_id")]
    found = [getattr(config, name, None) for name in names]
    return [number for number in found if isinstance(number, int)]


def find_class(checkpoint: Checkpoint) -> ModelClass:
    """The class that loads the encoder of `checkpoint`.

    Raises:
        StartupError: transformers has no such architecture, or the architecture has no encoder that this server knows.
    """
    config = _config(dict(checkpoint.config), checkpoint)
    inner = getattr(config, _INNER, None)
    try:
        if (found := class_of(config.model_type)) is not None:
            return _receiving(ModelClass(found, config), checkpoint)
        if inner is not None and (found := class_of(inner.model_type)) is not None:
            return _receiving(ModelClass(found, inner, prefix=_INNER.removesuffix("_config") + "."), checkpoint)
    except ImportError as error:
        raise StartupError(f"model {checkpoint.name!r} needs a package: {first_line(error)}") from error
    raise StartupError(
        f"model {checkpoint.name!r}: model_type {checkpoint.model_type!r} is not supported; "
        "its class in transformers gives no image, video or audio features"
    )


def _receiving(found: ModelClass, checkpoint: Checkpoint) -> ModelClass:
    """`found`, if it has a language model that receives rows in place of tokens. Raises StartupError."""
    if not any(placeholders(found.config, modality) for modality in Modality):
        raise StartupError(
            f"model {checkpoint.name!r}: model_type {checkpoint.model_type!r} is not supported; the configuration of "
            f"{found.cls.__name__} names no token that an image, video or audio takes the place of, so that no rows of "
            "it can be checked (CLIP, SigLIP and their successors are supported)"
        )
    return found


def _config(content: dict[str, Any], checkpoint: Checkpoint) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    model_type = checkpoint.model_type
    if model_type not in CONFIG_MAPPING_NAMES:
        advice = "; code that comes with a checkpoint is never run, use its conversion for transformers" * (
            "auto_map" in content
        )
        raise StartupError(
            f"model {checkpoint.name!r}: model_type {model_type!r} is not supported; "
            f"the installed transformers has no class for it{advice}"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(content)
    except Exception as error:  # Configuration classes validate in many ways.
        raise StartupError(f"model {checkpoint.name!r}: config.json is not valid: {first_line(error)}") from error


def class_of(model_type: str) -> Any:
    """transformers' class of `model_type` that gives features of any modality, or None.

    Raises:
        ImportError: a class that might be it needs a package that is missing.
    """
    failure: ImportError | None = None
    for names in _mappings():
        named = names.get(model_type, ())
        for name in (named,) if isinstance(named, str) else named:
            try:
                cls = _class(name)
                if cls is not None and any(hasattr(cls, f"get_{modality}_features") for modality in Modality):
                    return cls
            except ImportError as error:
                failure = error
    if failure is not None:
        raise failure
    return None


def _mappings() -> Iterator[Mapping[str, Any]]:
    from transformers.models.auto import modeling_auto

    for task in ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SPEECH_SEQ_2_SEQ", "PRETRAINING"):
        yield getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
    yield modeling_auto.MODEL_MAPPING_NAMES


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name, None)
