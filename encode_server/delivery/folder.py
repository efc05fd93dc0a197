"""The directory of stored embeddings: `DIR/<identifier>/encoder_cache.safetensors`, each complete or not there.

Several servers may share one directory. All names are looked up below an open directory, and no link is followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from encode_server.errors import BadRequest, DeliveryFailed, StartupError, StoreFull
from encode_server.wire.tensorfile import expected_size, head_metadata

log = logging.getLogger(__name__)

ENTRY = "encoder_cache.safetensors"
TEMPORARY = re.compile(r"\.encoder_cache\.[0-9a-f]{16}\.tmp")
IDENTIFIER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:-]{0,199}")
DIGEST = re.compile(r"[0-9a-f]{64}")
FLOOR_S = 60.0  # a consumer that has seen an entry gets so long to load it
LOW_WATER = 0.9  # room is made for more than one entry, because each time the whole directory is read
HEADER_BYTES = 64 << 10
TRIES = 5

MAX_ENTRIES = 100_000  # each takes two inodes, and a look whenever room is made
BLOCK = 4096  # bytes; a file takes whole ones, and its folder one

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def on_disk(size: int) -> int:
    """What an entry of `size` bytes takes of a disk, its folder included."""
    return -(-size // BLOCK) * BLOCK + BLOCK


def check_identifier(identifier: str) -> None:
    """Raises BadRequest unless it can be a folder's name and nothing else."""
    if not IDENTIFIER.fullmatch(identifier):
        raise BadRequest(
            f"uuid is {identifier[:80]!r}, expected 1 to 200 letters, digits, '.', '_', ':' or '-', "
            "the first a letter, a digit or '_'"
        )


@dataclass(frozen=True)
class _Entry:
    name: str
    size: int
    modified: float


class EntryFolder:
    """Writes entries and removes old ones. Its methods block: call them in worker threads, any number concurrently.

    `max_bytes`: of all entries together, as the disk has them. `max_entries`: how many there may be. `max_age_s`: an
    entry goes when it was written so long ago. Younger than `floor_s` none goes, whatever the bytes. Raises
    StartupError when `path` cannot be written to.
    """

    def __init__(
        self,
        path: str,
        *,
        max_bytes: int,
        max_age_s: float,
        floor_s: float = FLOOR_S,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        self.max_bytes, self._max_age_s, self._floor_s = max_bytes, max_age_s, floor_s
        self._max_entries, self._entry_count = max_entries, 0
        self._lock = threading.Lock()
        self._used: int | None = None  # not known before the directory was read
        self._writing_bytes = self._writing = 0  # entries that are being written: counted, and not in place yet
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise StartupError(f"--ec-store: {path}: {(error.strerror or str(error)).lower()}") from None
        if not os.access(path, os.W_OK | os.X_OK):
            os.close(self._root)
            raise StartupError(f"--ec-store: {path} cannot be written to")
        weakref.finalize(self, os.close, self._root)  # not earlier: a thread may still be writing

    def write(self, identifier: str, pieces: Sequence[bytes | memoryview]) -> None:
        """Put an entry in place, over an older one of that name.

        Raises BadRequest for an unsafe identifier, StoreFull without room for it, DeliveryFailed when the directory
        cannot be written to. Whatever the exit, no part of a file is left.
        """
        check_identifier(identifier)
        size = on_disk(sum(memoryview(piece).nbytes for piece in pieces))
        more = max(0, size - self._size_of(identifier))
        self._reserve(more)
        try:
            self._write(identifier, pieces, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreFull("the disk of the embedding store is full", bound="store") from None
            log.error("cannot store %s: %s", identifier, error)
            raise DeliveryFailed(f"the embedding store cannot be written to: {error.strerror}") from None
        finally:
            with self._lock:
                self._writing_bytes -= more
                self._writing -= 1

    def metadata(self, identifier: str) -> dict[str, str]:
        """What the head of an entry says of its content; empty where there is no entry, or none of ours."""
        check_identifier(identifier)
        try:
            with self._opened(identifier) as folder:
                file = os.open(ENTRY, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
                try:
                    return head_metadata(os.read(file, HEADER_BYTES))
                finally:
                    os.close(file)
        except OSError:
            return {}

    def content(self, identifier: str, nbytes: int) -> bytes | None:
        """The last `nbytes` bytes of an entry, its tensor; None where there is no whole entry with one of that size."""
        check_identifier(identifier)
        try:
            with self._opened(identifier) as folder:
                descriptor = os.open(ENTRY, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
                with os.fdopen(descriptor, "rb") as file:
                    head = file.read(HEADER_BYTES)
                    begin = 8 + int.from_bytes(head[:8], "little")
                    size = os.fstat(descriptor).st_size
                    if expected_size(head) != size or size - begin != nbytes:
                        return None
                    file.seek(begin)
                    data = file.read(nbytes)
        except OSError:
            return None
        return data if len(data) == nbytes else None

    @property
    def used_bytes(self) -> int:
        """Of all entries, as last counted: other servers write into the directory as well."""
        return self._used or 0

    def expire(self) -> int:
        """Remove what is too old, and the oldest while there are too many bytes; how many entries went."""
        with self._lock:
            return self._expire(self.max_bytes)

    def sweep(self) -> int:
        """Remove what a crash left: unfinished files nobody is writing, and entries cut short; how many went."""
        gone = 0
        for name in self._names():
            with contextlib.suppress(OSError), self._opened(name) as folder:
                with os.scandir(folder) as found:
                    unfinished = [file.name for file in found if TEMPORARY.fullmatch(file.name)]
                for file in unfinished:
                    if _abandoned(folder, file):
                        os.unlink(file, dir_fd=folder)
                        gone += 1
                if _cut_short(folder):
                    os.unlink(ENTRY, dir_fd=folder)
                    gone += 1
        return gone

    def _write(self, identifier: str, pieces: Sequence[bytes | memoryview], size: int) -> None:
        for attempt in range(TRIES):
            with contextlib.suppress(FileExistsError):
                os.mkdir(identifier, dir_fd=self._root)
            try:
                with self._opened(identifier) as folder:
                    _write_entry(folder, pieces, lambda name: self._place(folder, name, size))
                    return
            except FileNotFoundError:  # another server found the folder empty, or the file not locked yet
                if attempt == TRIES - 1:
                    raise

    def _place(self, folder: int, name: str, size: int) -> None:
        """Rename what was written, and count what that changes."""
        with self._lock:  # nobody counts the directory meanwhile, or replaces the same entry
            old = _size_in(folder)
            os.rename(name, ENTRY, src_dir_fd=folder, dst_dir_fd=folder)
            self._used = (self._used or 0) + size - (old or 0)
            self._entry_count += old is None

    def _size_of(self, identifier: str) -> int:
        """What an entry takes of the disk; 0 where there is none."""
        with contextlib.suppress(OSError), self._opened(identifier) as folder:
            return _size_in(folder) or 0
        return 0

    def _reserve(self, size: int) -> None:
        """Count bytes before they are written: of many that are written concurrently, each must find room of its own.
        Raises StoreFull."""
        with self._lock:
            if self._used is None:
                self._expire(self.max_bytes)
            if self._full(size):
                self._expire(int(self.max_bytes * LOW_WATER) - size, int(self._max_entries * LOW_WATER))
            if self._full(size):
                raise StoreFull(
                    f"the embedding store has no room for {size} bytes: what it holds is too new to be removed",
                    headers={"Retry-After": str(round(self._floor_s) or 1)},
                    bound="store",
                )
            self._writing_bytes += size
            self._writing += 1

    def _full(self, size: int) -> bool:
        held = (self._used or 0) + self._writing_bytes
        return held + size > self.max_bytes or self._entry_count + self._writing >= self._max_entries

    def _expire(self, max_bytes: int, max_entries: int | None = None) -> int:
        most = self._max_entries if max_entries is None else max_entries
        now = time.time()
        entries = sorted(self._entries(), key=lambda entry: entry.modified)
        self._used, self._entry_count, gone = sum(entry.size for entry in entries), len(entries), 0
        for entry in entries:
            age = now - entry.modified
            if age < self._floor_s or (age < self._max_age_s and self._used <= max_bytes and self._entry_count <= most):
                break
            self._remove(entry.name)
            self._used -= entry.size
            self._entry_count -= 1
            gone += 1
        return gone

    def _entries(self) -> Iterator[_Entry]:
        for name in self._names():
            try:
                with self._opened(name) as folder:
                    found = os.stat(ENTRY, dir_fd=folder, follow_symlinks=False)
            except FileNotFoundError:
                self._forget_lookup(name)
            except OSError:
                continue
            else:
                yield _Entry(name, _size(found), found.st_mtime)

    def _forget_lookup(self, name: str) -> None:
        # vLLM makes the folder of whatever it looks up. Only names like its digests: the directory may have other uses.
        with contextlib.suppress(OSError):
            age = time.time() - os.stat(name, dir_fd=self._root, follow_symlinks=False).st_mtime
            if DIGEST.fullmatch(name) and age > self._max_age_s:
                os.rmdir(name, dir_fd=self._root)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(OSError):
            with self._opened(name) as folder:
                os.unlink(ENTRY, dir_fd=folder)
            os.rmdir(name, dir_fd=self._root)

    def _names(self) -> list[str]:
        with os.scandir(self._root) as found:
            return [e.name for e in found if IDENTIFIER.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        folder = os.open(name, _DIRECTORY, dir_fd=self._root)
        try:
            yield folder
        finally:
            os.close(folder)


def _size(found: os.stat_result) -> int:
    return max(on_disk(found.st_size), found.st_blocks * 512 + BLOCK)


def _size_in(folder: int) -> int | None:
    """What the entry in this folder takes of the disk; None where there is none."""
    try:
        return _size(os.stat(ENTRY, dir_fd=folder, follow_symlinks=False))
    except FileNotFoundError:
        return None


def _write_entry(folder: int, pieces: Sequence[bytes | memoryview], place: Callable[[str], None]) -> None:
    """Write a file below `folder`, and have it put in place by its name."""
    name = f".encoder_cache.{secrets.token_hex(8)}.tmp"
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)  # says to `sweep` that somebody is at it
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                view = view[os.write(file, view) :]
        place(name)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)
        raise
    finally:
        os.close(file)


def _abandoned(folder: int, name: str) -> bool:
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _cut_short(folder: int) -> bool:
    """Whether the entry is shorter than its header says: the machine went down before its last bytes were on disk."""
    try:
        file = os.open(ENTRY, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    except OSError:
        return False
    try:
        expected = expected_size(os.read(file, HEADER_BYTES))
        return expected is None or os.fstat(file).st_size != expected
    finally:
        os.close(file)
