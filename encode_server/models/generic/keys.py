"""Which tensors of a checkpoint make up the encoder, told by transformers' own conversion of released layouts.

Only this file uses `core_model_loading` and `conversion_mapping`, which promise no stable interface.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from encode_server.errors import StartupError, first_line
from encode_server.models.checkpoint import Checkpoint
from encode_server.models.generic.classes import find_class
from encode_server.models.generic.skeleton import skeleton
from encode_server.models.weights import quiet


def encoder_keys(model: Any, keys: Iterable[str], prefix: str = "") -> dict[str, str]:
    """Checkpoint key → name in `model`, a stripped skeleton, for every key that the encoder needs.

    `prefix`: what encoder keys begin with before transformers' own conversion applies; other keys are left out.
    """
    named = converted(model, [key.removeprefix(prefix) for key in keys if key.startswith(prefix)])
    return {f"{prefix}{key}": name for key, (name, _) in named.items()}


def converted(model: Any, keys: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Checkpoint key → name in `model`, a skeleton, and whether the tensor is kept as it is, for the keys it needs.

    A tensor that is not kept as it is is cut, joined or reordered on the way.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    wanted = dict(model.state_dict())
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    found = {}
    for key in sorted(keys, key=dot_natural_key):
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if name in wanted:
            found[key] = (name, converter is None)
    return found


def selector(checkpoint: Checkpoint) -> Callable[[Iterable[str]], dict[str, str]]:
    """`Checkpoint.encoder_keys` of a checkpoint whose family has no rules of its own.

    Raises:
        StartupError: see `find_class`.
    """
    found = find_class(checkpoint)
    try:
        with quiet():
            model = skeleton(found)
    except ImportError as error:
        raise StartupError(f"model {checkpoint.name!r} needs a package: {first_line(error)}") from error
    except Exception as error:  # Whatever a class makes of a configuration that is not for it.
        raise StartupError(
            f"model {checkpoint.name!r}: no model can be built from its config.json: {first_line(error)}"
        ) from error

    def select(keys: Iterable[str]) -> dict[str, str]:
        # transformers converts the names while it loads: only what it does not know is taken off here
        return {key: key.removeprefix(found.prefix) for key in encoder_keys(model, keys, found.prefix)}

    return select
