"""Media in files of this machine, below directories that the operator named."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from encode_server.errors import BadMedia, Forbidden
from encode_server.media.limits import MediaLimits

_READ = 1 << 20

MAX_URL = 4096  # characters, as long as a path may be


class FileRoots:
    """Reads files below `roots` and no others. A link is followed only if its target lies below a root too."""

    def __init__(self, roots: Sequence[str | Path]) -> None:
        """Raises `ValueError` for a root that is no directory."""
        self._written = tuple(str(Path(root).absolute()) for root in roots)
        self._roots = tuple(os.path.realpath(root) for root in roots)
        for root in self._roots:
            if not Path(root).is_dir():
                raise ValueError(f"{root} is no directory")

    def is_path(self, text: str) -> bool:
        """True if `text` is to be read as a plain path: it begins with a root.

        Any other text that begins with a slash is base64, as every JPEG in base64 does.
        """
        if not text.startswith("/") or len(text) > MAX_URL:
            return False
        return any(text.startswith(root.rstrip("/") + "/") for root in (*self._written, *self._roots))

    def read(self, text: str, limits: MediaLimits) -> bytes:
        """Read a file:// URL or an absolute path. Blocks on the disk.

        Raises `Forbidden` for what isn't below a root or no regular file, `BadMedia` for what can't be read, `TooLarge`
        beyond `limits.max_bytes`. No message holds a path.
        """
        if len(text) > MAX_URL:  # the system would look up every part of a path
            raise Forbidden("this server's options do not allow to read that file")
        path = _path(text)
        try:
            real = os.path.realpath(path)
        except OSError as error:
            # A link was replaced while the system followed it.
            raise BadMedia("the file cannot be read") from error
        for root in self._roots:
            if os.path.commonpath((root, real)) == root and real != root:
                return _read(root, os.path.relpath(real, root), limits)
        raise Forbidden("this server's options do not allow to read that file")


def _path(text: str) -> str:
    if text[:5].lower() == "file:":
        try:
            parts = urlsplit(text)
        except ValueError as error:
            raise BadMedia("the file URL is malformed, expected file:///path") from error
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
            raise BadMedia("the file URL is malformed, expected file:///path")
        text = unquote(parts.path)
    # A lone surrogate can't be part of a file's name.
    if not text.startswith("/") or "\0" in text or not text.isprintable():
        raise BadMedia("the file URL is malformed, expected file:///path")
    return text


def _read(root: str, relative: str, limits: MediaLimits) -> bytes:
    try:
        descriptor = _open_below(root, relative.split("/"))
        try:
            return _read_all(descriptor, limits)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BadMedia("the file cannot be read") from error


def _read_all(descriptor: int, limits: MediaLimits) -> bytes:
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        raise Forbidden("only regular files can be read")
    limits.check_bytes(about.st_size)
    parts: list[bytes] = []
    size = 0
    while part := os.read(descriptor, _READ):
        size += len(part)
        limits.check_bytes(size)
        parts.append(part)
    if not size:
        raise BadMedia("the file is empty")
    return b"".join(parts)


def _open_below(root: str, names: Sequence[str]) -> int:
    """Open a path that holds no link, step by step, so that a link put there meanwhile is refused, not followed."""
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in names[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = inner
        # A pipe without a writer would block the open for good.
        return os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    finally:
        os.close(folder)
