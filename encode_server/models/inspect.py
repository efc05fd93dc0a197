"""What the front needs to know of a checkpoint before the ranks start, found out by a short-lived child process.

`inspect` may download and import anything; `preload_modules` imports neither torch nor a media decoder and never uses
the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from encode_server.errors import StartupError, first_line
from encode_server.models.checkpoint import read_json
from encode_server.models.quantised import check_unquantised
from encode_server.models.registry import ARCHITECTURES, check_tp, known, stored_dtype, summarize
from encode_server.models.resolve import resolve
from encode_server.wire.checkpoint import Batching, Facts, Inspection, Proof
from encode_server.wire.modality import Modality

_PROCESSOR_MODULES = {
    Modality.IMAGE: ["transformers.image_processing_backends", "transformers.models.auto.image_processing_auto"],
    Modality.VIDEO: ["transformers.video_processing_utils", "transformers.models.auto.video_processing_auto"],
    Modality.AUDIO: [
        "transformers.feature_extraction_sequence_utils",
        "transformers.models.auto.feature_extraction_auto",
    ],
}


def inspect(arguments: tuple[str, str | None, int]) -> Inspection:
    """For `arguments` (model, revision, tp): find the checkpoint that `model` names, download the encoder's files if
    necessary, and describe the checkpoint.

    `model` and `revision`: as for `resolve.resolve`. `tp`: the number of ranks that will share the encoder.

    Raises:
        StartupError: unknown model, missing or unreadable files, an unsupported architecture, an encoder that is
            itself quantised, or a `tp` that does not divide the attention heads of a family with rules of its own (in
            other families such heads stay whole). The message is one line for the operator.
    """
    from encode_server.media.samples import probe_media
    from encode_server.models.families import family_of
    from encode_server.models.verify import check_tensors

    model, revision, tp = arguments
    checkpoint = resolve(model, revision)
    if tp < 1:
        raise StartupError(f"tp must be at least 1, got {tp}")
    facts = None
    if known(checkpoint) is not None:
        summary = summarize(checkpoint)
        check_tp(summary, tp)
        check_unquantised(checkpoint)
        check_tensors(family_of(checkpoint))
        modalities, dtype = sorted(summary.modalities), summary.dtype
    else:
        from encode_server.models.families.generic import Generic
        from encode_server.models.generic.discover import discover

        family = Generic(checkpoint)
        check_unquantised(checkpoint)
        check_tensors(family)
        try:
            facts = discover(family, tp)
        except StartupError:
            raise
        except Exception as error:  # Of any model and processor class that transformers has.
            raise StartupError(
                f"model {checkpoint.name!r}: {family.found.cls.__name__} cannot be run: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error
        modalities, dtype = sorted(facts.modalities), stored_dtype(checkpoint, ())
    return Inspection(
        path=str(checkpoint.path),
        name=checkpoint.name,
        revision=checkpoint.revision,
        model_type=checkpoint.model_type,
        modalities=modalities,
        dtype=dtype,
        probes={modality: probe_media(modality) for modality in modalities},
        preload=_preload(checkpoint.model_type, checkpoint.config),
        facts=facts,
        notes=_notes(facts, tp) if facts is not None else [],
    )


def _notes(facts: Facts, tp: int) -> list[str]:
    notes = [f"{modality} is not offered: {reason}" for modality, reason in facts.refused.items()]
    if facts.whole:
        notes.append(f"each of the {tp} ranks holds all of {', '.join(facts.whole)}: their parts do not add up")
    if facts.undivided:
        notes.append(f"each of the {tp} ranks holds all of {', '.join(facts.undivided)}: {tp} does not divide them")
    if facts.left_out:
        notes.append(f"{', '.join(facts.left_out)}: not loaded, because it encodes nothing")
    for modality, one in facts.modalities.items():
        if one.batching is Batching.ALONE:
            notes.append(f"{modality} is encoded one by one: a batch gives other rows")
        if one.proof is Proof.COUNTED:
            notes.append(
                f"{modality} is compared with the number of placeholders only, not with the model's own forward"
            )
    return notes


def preload_modules(model: str, revision: str | None) -> list[str]:
    """`Inspection.preload` of `model`, if its config.json is already on this machine, else an empty list.

    Every problem with the checkpoint also gives an empty list: `inspect` reports the problem.
    """
    if model == "demo":
        from encode_server.models.demo import MODEL_TYPE

        return _preload(MODEL_TYPE)
    config = _local_config(model, revision)
    if config is None:
        return []
    try:
        content = read_json(config, model)
    except StartupError:
        return []
    return _preload(str(content.get("model_type", "")), content)


def _local_config(model: str, revision: str | None) -> Path | None:
    directory = Path(model).expanduser()
    if directory.is_dir():
        return directory / "config.json"
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except (HFValidationError, OSError):
        return None
    return Path(cached) if isinstance(cached, str) else None


def _preload(model_type: str, config: Mapping[str, Any] = MappingProxyType({})) -> list[str]:
    """The modelling code of `model_type`, and what the processors of its modalities are built on.

    `config`: config.json, whose parts say what else a family without rules of its own is built from.
    """
    architecture = ARCHITECTURES.get(model_type)
    if architecture is None:
        return _modelling(config)
    package = architecture.package
    processors = [module for modality in sorted(architecture.modalities) for module in _PROCESSOR_MODULES[modality]]
    return [f"transformers.models.{package}.modeling_{package}", *processors]


def _modelling(config: Mapping[str, Any]) -> list[str]:
    """transformers' modelling modules of a configuration and its parts, found without importing transformers."""
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        return []
    types = [
        config.get("model_type"),
        *(part.get("model_type") for part in config.values() if isinstance(part, Mapping)),
    ]
    found = []
    for name in types:
        package = str(name)
        while package:  # parts are called like `siglip_vision_model`, packages like `siglip`
            if (
                re.fullmatch(r"\w+", package)
                and (Path(spec.origin).parent / "models" / package / f"modeling_{package}.py").is_file()
            ):
                found.append(f"transformers.models.{package}.modeling_{package}")
                break
            package = package.rpartition("_")[0]
    return list(dict.fromkeys(found))
