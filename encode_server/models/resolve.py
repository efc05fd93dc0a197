"""Where a checkpoint is: a directory, a hub id, or the embedded demo."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from encode_server.errors import StartupError, first_line
from encode_server.models.checkpoint import Checkpoint, Chooser, indexed_shards, read_json, weight_files
from encode_server.models.quantised import unquantised
from encode_server.models.registry import known

HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.ttf")
"""What is fetched from the hub beside the encoder's shards: configuration, processors, tokenizers and the font that one
of them writes with, never code or pickles."""


def resolve(model: str, revision: str | None = None) -> Checkpoint:
    """Find the checkpoint that `model` names: `demo`, a directory, or a hub id (`revision`: branch, tag or commit).

    A hub checkpoint is downloaded, as far as the encoder needs it, unless the hub's offline variables
    (`HF_HUB_OFFLINE`) say otherwise.

    Raises:
        StartupError: unknown model, missing or unreadable files.
    """
    if model == "demo":
        from encode_server.models.demo import demo_path

        return open_directory(demo_path(), name=model)
    path = Path(model).expanduser()
    if path.is_dir():
        return open_directory(path, name=model)
    if names_a_path(model):
        raise StartupError(f"model {model!r}: no such directory")
    snapshot = _download(model, revision)
    return open_directory(snapshot, name=model, revision=snapshot.name)


def names_a_path(model: str) -> bool:
    """Whether `model` can only be a path, because no hub id looks like it. A relative path may look like a hub id."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def open_directory(path: Path, *, name: str | None = None, revision: str = "") -> Checkpoint:
    """The checkpoint in directory `path`, checked for what loading needs where that is known without transformers.

    Raises:
        StartupError: config.json or the safetensors are missing or unreadable, or the architecture is unsupported.
    """
    name = name or str(path)
    config = unquantised(read_json(path / "config.json", name))
    checkpoint = Checkpoint(path, config, name, chooser(), revision)
    if not checkpoint.model_type:
        raise StartupError(f"model {name!r}: config.json names no model_type")
    if known(checkpoint) is not None:
        weight_files(checkpoint)
    return checkpoint


def chooser() -> Chooser:
    """Chooses the keys of one checkpoint: by its family's pattern, or by what transformers would load, which takes long
    to find out and is found out once."""
    found: list[Callable[[Iterable[str]], dict[str, str]]] = []

    def choose(checkpoint: Checkpoint, keys: Iterable[str]) -> dict[str, str]:
        if not found:
            found.append(_by_family(checkpoint))
        return found[0](keys)

    return choose


def _by_family(checkpoint: Checkpoint) -> Callable[[Iterable[str]], dict[str, str]]:
    if (architecture := known(checkpoint)) is not None:
        return partial(_matching, re.compile(architecture.weights))
    from encode_server.models.generic.keys import selector

    return selector(checkpoint)


def _matching(pattern: re.Pattern[str], keys: Iterable[str]) -> dict[str, str]:
    selected = {}
    for key in keys:
        if (found := pattern.match(key)) is not None:
            selected[key] = key[found.start("name") :] if "name" in pattern.groupindex else key
    return selected


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        path = Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_FILES)))
        checkpoint = Checkpoint(path, unquantised(read_json(path / "config.json", model)), model, chooser())
        shards = indexed_shards(checkpoint) or ["*.safetensors"]
        # huggingface_hub before 2.0 asks the hub for the files of a commit, offline or not.
        offline = bool(constants.HF_HUB_OFFLINE)
        return Path(snapshot_download(model, revision=path.name, allow_patterns=shards, local_files_only=offline))
    except HFValidationError as error:
        raise StartupError(f"model {model!r} is neither a directory nor a valid hub id") from error
    except RevisionNotFoundError as error:
        raise StartupError(f"model {model!r} has no revision {revision!r} on the hub") from error
    except LocalEntryNotFoundError as error:
        raise StartupError(
            f"model {model!r} is neither a directory nor in the local hub cache, and the hub cannot be reached"
        ) from error
    except RepositoryNotFoundError as error:
        raise StartupError(f"model {model!r} is neither a directory nor a hub id you have access to") from error
    except (OSError, ValueError) as error:
        raise StartupError(f"model {model!r} cannot be fetched from the hub: {first_line(error)}") from error
