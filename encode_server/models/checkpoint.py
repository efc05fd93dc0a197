"""Where a checkpoint is: a directory, a hub id, or the embedded demo.

Reads JSON and headers only; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from encode_server.errors import StartupError, first_line

HUB_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.ttf")
"""What is fetched from the hub beside the encoder's shards: configuration, processors, tokenizers and the font that one
of them writes with, never code or pickles."""

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    `path`: its directory. `config`: its config.json without any `quantization_config`. `name`: as the operator gave the
    checkpoint. `revision`: the commit of a hub checkpoint, empty for a directory.
    """

    path: Path
    config: Mapping[str, Any]
    name: str
    revision: str = ""

    @property
    def model_type(self) -> str:
        """The architecture's name in config.json."""
        return str(self.config.get("model_type", ""))

    def encoder_keys(self, keys: Iterable[str]) -> dict[str, str]:
        """Those of all the checkpoint's `keys` that the encoder needs → the name to load each by.

        Raises:
            StartupError: an architecture without an encoder that this server knows.
        """
        return self._select(keys)

    @cached_property
    def _select(self) -> Callable[[Iterable[str]], dict[str, str]]:
        from encode_server.models.registry import known

        if (architecture := known(self)) is not None:
            return partial(_matching, re.compile(architecture.weights))
        from encode_server.models.generic.keys import selector

        return selector(self)


def _matching(pattern: re.Pattern[str], keys: Iterable[str]) -> dict[str, str]:
    selected = {}
    for key in keys:
        if (found := pattern.match(key)) is not None:
            selected[key] = key[found.start("name") :] if "name" in pattern.groupindex else key
    return selected


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
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise StartupError(f"model {model!r}: no such directory")
    snapshot = _download(model, revision)
    return open_directory(snapshot, name=model, revision=snapshot.name)


def open_directory(path: Path, *, name: str | None = None, revision: str = "") -> Checkpoint:
    """The checkpoint in directory `path`, checked for what loading needs where that is known without transformers.

    Raises:
        StartupError: config.json or the safetensors are missing or unreadable, or the architecture is unsupported.
    """
    from encode_server.models.quantised import unquantised
    from encode_server.models.registry import known

    name = name or str(path)
    config = unquantised(read_json(path / "config.json", name))
    checkpoint = Checkpoint(path=path, config=config, name=name, revision=revision)
    if not checkpoint.model_type:
        raise StartupError(f"model {name!r}: config.json names no model_type")
    if known(checkpoint) is not None:
        weight_files(checkpoint)
    return checkpoint


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The safetensors shards that may hold encoder weights, sorted.

    With an index those it names for a key of the encoder (others needn't even be there), else every *.safetensors of
    the directory.

    Raises:
        StartupError: there are none, or one that is needed is missing.
    """
    indexed = _indexed_shards(checkpoint)
    if indexed is None:
        return _all_shards(checkpoint)
    files = [checkpoint.path / shard for shard in indexed]
    if missing := [file.name for file in files if not file.is_file()]:
        raise StartupError(f"model {checkpoint.name!r}: {missing[0]} is named by {_INDEX} but missing")
    return files


def _all_shards(checkpoint: Checkpoint) -> list[Path]:
    if not (files := sorted(checkpoint.path.glob("*.safetensors"))):
        raise StartupError(f"model {checkpoint.name!r}: no *.safetensors file (other weight formats are not read)")
    return files


def _indexed_shards(checkpoint: Checkpoint) -> list[str] | None:
    """Names of the shards that the index names for a key of the encoder; None where there is no index."""
    if not (checkpoint.path / _INDEX).is_file():
        return None
    shards = read_json(checkpoint.path / _INDEX, checkpoint.name).get("weight_map")
    if not isinstance(shards, dict):
        raise StartupError(f"model {checkpoint.name!r}: {_INDEX} has no weight_map")
    # a name alone: a path could lead out of the directory
    names = sorted({Path(str(shards[key])).name for key in checkpoint.encoder_keys(shards)})
    if not names:
        raise StartupError(f"model {checkpoint.name!r}: {_INDEX} names no encoder weights")
    return names


@dataclass(frozen=True)
class Stored:
    """A tensor in a shard. `dtype`: safetensors' name, such as `BF16`."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def stored_tensors(file: Path) -> dict[str, Stored]:
    """The tensors of a shard by name, from its header alone.

    Raises:
        StartupError: the file is not safetensors, or ends before its tensors do.
    """
    tensors, ends = {}, {}
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100 << 20:
                raise ValueError("header too large")
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                tensors[name] = Stored(str(entry["dtype"]), tuple(entry["shape"]), end - start)
                ends[name] = 8 + length + end
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise StartupError(f"{file.name} is not a readable safetensors file") from error
    for name, end in ends.items():
        if end > size:
            raise StartupError(f"{file.name} is cut short: {name} ends at byte {end}, the file at byte {size}")
    return tensors


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint called `name`.

    Raises:
        StartupError: missing, unreadable, or not an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StartupError(f"model {name!r}: {path.name} is missing") from error
    except (OSError, ValueError) as error:
        raise StartupError(f"model {name!r}: {path.name} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise StartupError(f"model {name!r}: {path.name} is not a JSON object")
    return content


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from encode_server.models.quantised import unquantised

    try:
        path = Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_FILES)))
        checkpoint = Checkpoint(path, unquantised(read_json(path / "config.json", model)), model)
        shards = _indexed_shards(checkpoint) or ["*.safetensors"]
        return Path(snapshot_download(model, revision=path.name, allow_patterns=shards))
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
