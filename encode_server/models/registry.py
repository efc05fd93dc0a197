"""The architectures with rules of their own, and what config.json alone says of them. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from encode_server.errors import StartupError
from encode_server.models.checkpoint import Checkpoint, stored_tensors, weight_files
from encode_server.wire.dtypes import FROM_SAFETENSORS
from encode_server.wire.modality import Modality


@dataclass(frozen=True)
class Tower:
    """Where config.json describes a tower: keys leading to it, and the key of its attention heads with the default
    that the architecture's config class has (released files leave defaults out)."""

    path: tuple[str, ...]
    heads: str
    default_heads: int


@dataclass(frozen=True)
class Architecture:
    """One `model_type`.

    `family`: the `module:Class` under `families` that handles it. `package`: the package under `transformers.models`
    that holds its modelling code. `towers`: by name. `weights`: matches the start of the checkpoint keys that the
    encoder consists of; the group `name`, if there is one, begins the model's own name.
    """

    family: str
    package: str
    modalities: frozenset[Modality]
    towers: Mapping[str, Tower]
    weights: str


@dataclass(frozen=True)
class Summary:
    """What is known before anything is loaded. `heads`: attention heads per tower. `dtype`: the checkpoint's, in
    torch's name (`bfloat16`)."""

    modalities: frozenset[Modality]
    heads: dict[str, int]
    dtype: str


_VISION = frozenset({Modality.IMAGE, Modality.VIDEO})
_AUDIO = frozenset({Modality.AUDIO})
_IMAGE_ONLY = frozenset({Modality.IMAGE})
_QWEN_VISION = {"vision": Tower(("vision_config",), "num_heads", 16)}


def _omni(*path: str) -> dict[str, Tower]:
    return {
        "vision": Tower((*path, "vision_config"), "num_heads", 16),
        "audio": Tower((*path, "audio_config"), "encoder_attention_heads", 20),
    }


def _vision(*path: str) -> dict[str, Tower]:
    return {"vision": Tower(path, "num_attention_heads", 12)}


def _vl(package: str) -> Architecture:
    return Architecture("qwen_vl:QwenVL", package, _VISION, _QWEN_VISION, r"(model\.)?visual\.")


_OMNI_WEIGHTS = r"(thinker\.)?(?P<name>(model\.)?(visual|audio_tower)\.)"
_SIGLIP_WEIGHTS = r"(vision_model\.)?(embeddings|encoder|post_layernorm|head)\."
_CLIP_WEIGHTS = r"(vision_model\.)?(embeddings|pre_layrnorm|encoder|post_layernorm)\.|visual_projection\."

ARCHITECTURES: Mapping[str, Architecture] = {
    "qwen2_vl": _vl("qwen2_vl"),
    "qwen2_5_vl": _vl("qwen2_5_vl"),
    "qwen3_vl": _vl("qwen3_vl"),
    "qwen3_vl_moe": _vl("qwen3_vl_moe"),
    "qwen2_5_omni": Architecture(
        "qwen_omni:QwenOmni", "qwen2_5_omni", _VISION | _AUDIO, _omni("thinker_config"), _OMNI_WEIGHTS
    ),
    "qwen2_5_omni_thinker": Architecture(
        "qwen_omni:QwenOmni", "qwen2_5_omni", _VISION | _AUDIO, _omni(), _OMNI_WEIGHTS
    ),
    "qwen2_audio": Architecture(
        "qwen_audio:QwenAudio",
        "qwen2_audio",
        _AUDIO,
        {"audio": Tower(("audio_config",), "encoder_attention_heads", 20)},
        r"(model\.)?(audio_tower|multi_modal_projector)\.",
    ),
    "whisper": Architecture(
        "whisper:Whisper",
        "whisper",
        _AUDIO,
        {"audio": Tower((), "encoder_attention_heads", 6)},
        r"(model\.)?encoder\.(?P<name>)",
    ),
    "siglip": Architecture("image_towers:Siglip", "siglip", _IMAGE_ONLY, _vision("vision_config"), _SIGLIP_WEIGHTS),
    "siglip_vision_model": Architecture("image_towers:Siglip", "siglip", _IMAGE_ONLY, _vision(), _SIGLIP_WEIGHTS),
    "siglip2": Architecture("image_towers:Siglip2", "siglip2", _IMAGE_ONLY, _vision("vision_config"), _SIGLIP_WEIGHTS),
    "siglip2_vision_model": Architecture("image_towers:Siglip2", "siglip2", _IMAGE_ONLY, _vision(), _SIGLIP_WEIGHTS),
    "clip": Architecture("image_towers:Clip", "clip", _IMAGE_ONLY, _vision("vision_config"), _CLIP_WEIGHTS),
    "clip_vision_model": Architecture("image_towers:Clip", "clip", _IMAGE_ONLY, _vision(), _CLIP_WEIGHTS),
    "metaclip_2": Architecture(
        "image_towers:MetaClip2", "metaclip_2", _IMAGE_ONLY, _vision("vision_config"), _CLIP_WEIGHTS
    ),
    "metaclip_2_vision_model": Architecture(
        "image_towers:MetaClip2", "metaclip_2", _IMAGE_ONLY, _vision(), _CLIP_WEIGHTS
    ),
    "dinov2": Architecture(
        "image_towers:Dinov2",
        "dinov2",
        _IMAGE_ONLY,
        _vision(),
        r"(dinov2\.)?(?P<name>(embeddings|encoder|layers|layernorm)\.)",
    ),
}


def known(checkpoint: Checkpoint) -> Architecture | None:
    """The architecture of a checkpoint, if it is one with rules of its own; `generic` judges all others."""
    return ARCHITECTURES.get(checkpoint.model_type)


def check_supported(checkpoint: Checkpoint) -> Architecture:
    """The architecture of a checkpoint.

    Raises:
        StartupError: it has no rules of its own.
    """
    architecture = known(checkpoint)
    if architecture is None:
        raise StartupError(f"model {checkpoint.name!r}: model_type {checkpoint.model_type!r} has no rules of its own")
    return architecture


def summarize(checkpoint: Checkpoint) -> Summary:
    """What the configuration says of the encoder, without loading it.

    Raises:
        StartupError: unsupported architecture, or a configuration that lacks a tower.
    """
    architecture = check_supported(checkpoint)
    heads = {}
    for name, tower in architecture.towers.items():
        config = _at(checkpoint, tower.path)
        value = config.get(tower.heads, tower.default_heads)
        if not isinstance(value, int) or value < 1:
            raise StartupError(f"model {checkpoint.name!r}: {tower.heads} of the {name} tower is {value!r}")
        heads[name] = value
    return Summary(
        modalities=architecture.modalities,
        heads=heads,
        dtype=stored_dtype(checkpoint, [tower.path for tower in architecture.towers.values()]),
    )


def check_tp(summary: Summary, tp: int) -> None:
    """Check that `tp` ranks can share the attention heads evenly. MLP widths may be uneven: shards then differ by one.

    Raises:
        StartupError: a tower's heads cannot be divided by `tp`.
    """
    if tp < 1:
        raise StartupError(f"tp must be at least 1, got {tp}")
    for name, heads in summary.heads.items():
        if heads % tp:
            raise StartupError(f"tp {tp} does not divide the {heads} attention heads of the {name} tower")


def _at(checkpoint: Checkpoint, path: tuple[str, ...]) -> Mapping[str, Any]:
    config: Any = checkpoint.config
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    if not isinstance(config, Mapping):
        raise StartupError(f"model {checkpoint.name!r}: config.json has no {'.'.join(path)}")
    return config


def stored_dtype(checkpoint: Checkpoint, paths: Iterable[tuple[str, ...]]) -> str:
    """The dtype of a checkpoint's weights, in torch's name: as config.json says, at its top or on the way along
    `paths`, or else as the first shard has it."""
    for path in [(), *(path[:depth] for path in paths for depth in (1, 2))]:
        config = _at(checkpoint, path)
        named = config.get("dtype") or config.get("torch_dtype")
        if isinstance(named, str):
            return named.removeprefix("torch.")
    for stored in stored_tensors(weight_files(checkpoint)[0]).values():
        if stored.dtype in FROM_SAFETENSORS:
            return FROM_SAFETENSORS[stored.dtype]
    return "float32"
