"""A checkpoint on this machine: its configuration, its shards and what their headers say.

Reads JSON and headers only; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from encode_server.errors import StartupError, first_line

_INDEX = "model.safetensors.index.json"


Chooser = Callable[["Checkpoint", Iterable[str]], dict[str, str]]
"""Chooses from all keys of a checkpoint those that its encoder needs, each with the name to load it by."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    `path`: its directory. `config`: its config.json without any `quantization_config`. `name`: as the operator gave the
    checkpoint. `choose`: which of its keys the encoder needs. `revision`: the commit of a hub
    checkpoint, empty for a directory.
    """

    path: Path
    config: Mapping[str, Any]
    name: str
    choose: Chooser = field(compare=False, repr=False)
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
        return self.choose(self, keys)


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The safetensors shards that may hold encoder weights, sorted.

    With an index those it names for a key of the encoder (others needn't even be there), else every *.safetensors of
    the directory.

    Raises:
        StartupError: there are none, or one that is needed is missing.
    """
    indexed = indexed_shards(checkpoint)
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


def indexed_shards(checkpoint: Checkpoint) -> list[str] | None:
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
