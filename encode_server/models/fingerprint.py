"""What a server's embeddings depend on beside the media: the checkpoint's content, and the code that runs it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from encode_server.errors import StartupError
from encode_server.models.checkpoint import Checkpoint, weight_files
from encode_server.models.resolve import HUB_FILES, open_directory

PACKAGES = ("transformers", "torch", "torchvision", "numpy", "pillow", "av", "soundfile", "soxr")
"""What decodes, resizes and computes."""

SOURCES = ("media", "models", "prepare", "pipeline/pooling.py")
"""Of this program, what makes rows of media. The source counts, not a version: it cannot be forgotten."""

INDEX = "*.index.json"  # says where the weights lie, not what they are
NICE = 10  # the ranks load meanwhile
READ = 4 << 20  # bytes


def fingerprint(arguments: tuple[str, dict[str, Any]]) -> str:
    """For `arguments` (the checkpoint's directory, options that change embeddings): a digest that is equal for servers
    whose embeddings are interchangeable, and differs where these options, the weights of the encoder, any configuration
    file of the checkpoint, this program or a library differ at all. Neither the checkpoint's name nor its place matter.

    Reads the encoder's weights once, a gigabyte in about a second: call it in a child process.

    Raises:
        StartupError: the checkpoint's files cannot be read.
    """
    os.nice(NICE)
    path, options = arguments
    checkpoint = open_directory(Path(path))
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    try:
        for piece in (*_code(), *_configuration(checkpoint), *_weights(checkpoint)):
            digest.update(hashlib.sha256(piece).digest())
    except (OSError, ValueError, KeyError) as error:
        raise StartupError(f"model {checkpoint.name!r} cannot be read: {type(error).__name__}") from error
    return digest.hexdigest()


def _code() -> Iterator[bytes]:
    program = Path(__file__).parents[1]
    for file in sorted(file for source in SOURCES for file in _sources(program / source)):
        yield str(file.relative_to(program)).encode()
        yield file.read_bytes()
    for package in PACKAGES:
        try:
            yield f"{package} {metadata.version(package)}".encode()
        except metadata.PackageNotFoundError:
            yield package.encode()


def _sources(place: Path) -> Iterable[Path]:
    return place.rglob("*.py") if place.is_dir() else (place,)


def _configuration(checkpoint: Checkpoint) -> Iterator[bytes]:
    files = {file for pattern in HUB_FILES for file in checkpoint.path.glob(pattern) if not file.match(INDEX)}
    for file in sorted(files):
        yield file.name.encode()
        yield file.read_bytes()


def _weights(checkpoint: Checkpoint) -> Iterator[bytes]:
    """The encoder's tensors by name, wherever they lie."""
    tensors: dict[str, tuple[Path, int, int, bytes]] = {}
    for file in weight_files(checkpoint):
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for key in checkpoint.encoder_keys(header):
            start, end = header[key]["data_offsets"]
            what = f"{key} {header[key]['dtype']} {header[key]['shape']}".encode()
            tensors[key] = (file, 8 + length + start, 8 + length + end, what)
    for _, (file, start, end, what) in sorted(tensors.items()):
        yield what
        with file.open("rb") as stream:
            stream.seek(start)
            digest = hashlib.sha256()
            while piece := stream.read(min(READ, end - stream.tell())):
                digest.update(piece)
            yield digest.digest()
