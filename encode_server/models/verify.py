"""Whether a checkpoint holds the tensors that its configuration asks for, told from the headers of its files."""

from __future__ import annotations

from typing import Any

import torch

from encode_server.errors import StartupError, first_line
from encode_server.models.checkpoint import stored_tensors, weight_files
from encode_server.models.families.base import Family
from encode_server.models.generic.keys import converted
from encode_server.models.weights import missing_tensors, quiet


def check_tensors(family: Family) -> None:
    """Check names and shapes of the encoder's tensors. Nothing is loaded.

    Raises:
        StartupError: a tensor is missing or has another shape than the configuration says (the message names the tensor
            and its file), or no model can be built from the configuration.
    """
    checkpoint = family.checkpoint
    model = build_empty(family)
    wanted = model.state_dict()
    shards = {file: stored_tensors(file) for file in weight_files(checkpoint)}
    names = checkpoint.encoder_keys([key for tensors in shards.values() for key in tensors])
    found = converted(model, names.values())
    for file, tensors in shards.items():
        for key, tensor in tensors.items():
            name, kept = found.get(names.get(key, ""), ("", False))
            if kept and tensor.shape != (shape := tuple(wanted[name].shape)):
                raise StartupError(
                    f"model {checkpoint.name!r} does not match its config.json: {key} in {file.name} has shape "
                    f"{list(tensor.shape)}, expected {list(shape)}"
                )
    if not names:
        raise StartupError(f"model {checkpoint.name!r}: its safetensors hold no encoder weights")
    if all(kept for _, kept in found.values()):
        there = {name for name, _ in found.values()}
        missing_tensors(checkpoint, [name for name in wanted if name not in there and family.required(name)])


def build_empty(family: Family) -> Any:
    """The family's model without memory behind its weights.

    Raises:
        StartupError: no model can be built from the configuration, or a package is missing.
    """
    try:
        with quiet(), torch.device("meta"):
            model_class, config = family.model_class()
            return model_class(config)
    except ImportError as error:
        raise StartupError(f"model {family.checkpoint.name!r} needs a package: {first_line(error)}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        raise StartupError(
            f"model {family.checkpoint.name!r}: no model can be built from its config.json: {first_line(error)}"
        ) from error
