"""The directory of stored embeddings: whole entries or none, nothing outside it, old ones gone, new ones kept."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from encode_server.delivery.folder import ENTRY, EntryFolder, check_identifier, on_disk
from encode_server.errors import BadRequest, DeliveryFailed, StartupError, StoreFull
from encode_server.wire.tensorfile import expected_size, tensor_head

DIGEST = "0f" * 32


def entry(tokens: int = 4) -> list[bytes]:
    return [tensor_head("ec_cache", "float32", (tokens, 2), tokens * 8, {"model": "m"}), bytes(tokens * 8)]


def opened(path: Path, *, max_bytes: int = 1 << 20, max_age_s: float = 3600, floor_s: float = 60) -> EntryFolder:
    return EntryFolder(str(path), max_bytes=max_bytes, max_age_s=max_age_s, floor_s=floor_s)


def aged(path: Path, name: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path / name / ENTRY, (then, then))


def stored(path: Path) -> set[str]:
    return {file.parent.name for file in path.glob(f"*/{ENTRY}")}


@pytest.mark.parametrize("name", ["a", DIGEST, "sha256:" + DIGEST, "req-1_image.0", "_x", "A" * 200])
def test_plain_names_are_identifiers(name):
    check_identifier(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "...", ".hidden", "a/b", "../x", "/etc", "a\\b", "a b", "a\n", "a\0", "-rf", "ü", "A" * 201, "*"],
)
def test_nothing_else_is(name, tmp_path):
    with pytest.raises(BadRequest, match="uuid"):
        check_identifier(name)
    with pytest.raises(BadRequest, match="uuid"):
        opened(tmp_path).write(name, entry())
    assert not list(tmp_path.iterdir())


@given(st.text(max_size=30))
def test_whatever_passes_is_one_path_component(name):
    try:
        check_identifier(name)
    except BadRequest:
        return
    assert Path("/base", name).parent == Path("/base") and os.path.normpath(f"/base/{name}") == f"/base/{name}"


def test_an_entry_is_replaced_whole_and_readers_never_see_less(tmp_path):
    folder, done, seen = opened(tmp_path), threading.Event(), []

    def read() -> None:
        while not done.is_set():
            try:
                data = (tmp_path / "x" / ENTRY).read_bytes()
            except FileNotFoundError:
                continue
            seen.append(len(data) == expected_size(data))

    reader = threading.Thread(target=read)
    reader.start()
    for round_number in range(10_000):
        for tokens in (1000, 3, 500):
            folder.write("x", entry(tokens))
        if round_number >= 30 and seen:
            break
    done.set()
    reader.join()
    assert seen and all(seen)
    assert [file.name for file in (tmp_path / "x").iterdir()] == [ENTRY]


def test_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / ENTRY).write_bytes(b"precious")
    aged(tmp_path, "outside", 9999)
    store = tmp_path / "store"
    store.mkdir()
    (store / "link").symlink_to(outside)
    (store / "entry").mkdir()
    (store / "entry" / ENTRY).symlink_to(outside / ENTRY)
    folder = opened(store, floor_s=0)
    with pytest.raises(DeliveryFailed):
        folder.write("link", entry())
    folder.write("entry", entry())
    folder.sweep()
    folder.expire()
    assert (outside / ENTRY).read_bytes() == b"precious" and list(outside.iterdir()) == [outside / ENTRY]
    assert not (store / "entry" / ENTRY).is_symlink()


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    folder = opened(tmp_path)

    def full(file: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreFull) as caught:
        folder.write("x", entry())
    assert caught.value.status == 507 and "full" in caught.value.message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_entries_go_by_age(tmp_path):
    folder = opened(tmp_path, max_age_s=600)
    for name, age in (("old", 700), ("young", 500)):
        folder.write(name, entry())
        aged(tmp_path, name, age)
    assert folder.expire() == 1
    assert [path.name for path in tmp_path.iterdir()] == ["young"]


def test_the_oldest_go_when_there_are_too_many_bytes(tmp_path):
    size = on_disk(sum(map(len, entry(100))))
    folder = opened(tmp_path, max_bytes=10 * size)
    for i in range(10):
        folder.write(f"e{i}", entry(100))
        aged(tmp_path, f"e{i}", 1000 - i)
    folder.write("new", entry(100))
    assert stored(tmp_path) == {"new", *(f"e{i}" for i in range(2, 10))}, "one for the new, one towards 90 %"


def test_what_was_just_written_stays_whatever_the_bytes(tmp_path):
    size = on_disk(sum(map(len, entry(100))))
    folder = opened(tmp_path, max_bytes=3 * size)
    for i in range(3):
        folder.write(f"e{i}", entry(100))
    with pytest.raises(StoreFull, match="too new") as caught:
        folder.write("late", entry(100))
    assert caught.value.headers["Retry-After"] == "60"
    assert stored(tmp_path) == {"e0", "e1", "e2"}
    aged(tmp_path, "e1", 61)
    folder.write("late", entry(100))
    assert stored(tmp_path) == {"e0", "e2", "late"}


def test_small_entries_count_as_what_the_disk_has(tmp_path):
    folder = opened(tmp_path, max_bytes=1 << 20)
    with pytest.raises(StoreFull):
        for i in range(1000):
            folder.write(f"e{i}", entry(1))
    of_disk = sum(path.stat().st_blocks * 512 for path in tmp_path.rglob("*"))
    assert of_disk <= 1 << 20


def test_entries_are_counted_too(tmp_path):
    folder = EntryFolder(str(tmp_path), max_bytes=1 << 30, max_age_s=3600, max_entries=10)
    for i in range(10):
        folder.write(f"e{i}", entry(1))
    with pytest.raises(StoreFull):
        folder.write("more", entry(1))
    aged(tmp_path, "e3", 61)
    folder.write("more", entry(1))
    assert "e3" not in stored(tmp_path)


def test_an_entry_that_replaces_another_counts_once(tmp_path):
    folder = opened(tmp_path, max_bytes=3 * on_disk(5000))
    for _ in range(20):
        folder.write("same", entry(500))
        assert folder.used_bytes == on_disk(5000)
    folder.write("same", entry(4))
    assert folder.used_bytes == on_disk(100)
    for name in ("b", "c"):
        folder.write(name, entry(500))
    with pytest.raises(StoreFull):
        folder.write("d", entry(500))
    folder.write("c", entry(500))  # takes no more room than it has


def test_entries_written_concurrently_do_not_share_room(tmp_path, monkeypatch):
    folder, size = opened(tmp_path, max_bytes=4 * on_disk(5000)), on_disk(5000)
    begun, go_on = threading.Barrier(5), threading.Event()
    whole = os.write

    def slow(file, data):
        if len(data) > 1000:
            begun.wait(10)
            go_on.wait(10)
        return whole(file, data)

    monkeypatch.setattr(os, "write", slow)
    writers = [threading.Thread(target=folder.write, args=(f"e{n}", entry(500))) for n in range(4)]
    for writer in writers:
        writer.start()
    begun.wait(10)
    folder.expire()  # counts the directory anew, in which nothing is yet
    with pytest.raises(StoreFull):
        folder.write("fifth", entry(500))
    go_on.set()
    for writer in writers:
        writer.join(10)
    assert folder.used_bytes == 4 * size and len(stored(tmp_path)) == 4


def test_an_entry_another_server_wrote_counts(tmp_path):
    size = on_disk(sum(map(len, entry(100))))
    opened(tmp_path).write("theirs", entry(100))
    aged(tmp_path, "theirs", 100)
    opened(tmp_path, max_bytes=int(1.5 * size)).write("ours", entry(100))
    assert stored(tmp_path) == {"ours"}


def test_sweep_removes_what_a_crash_left_and_nothing_else(tmp_path):
    opened(tmp_path).write("good", entry())
    for name in ("crashed", "writing", "short", "empty-file", "foreign"):
        (tmp_path / name).mkdir()
    (tmp_path / "crashed" / ".encoder_cache.0123456789abcdef.tmp").write_bytes(b"half")
    held = tmp_path / "writing" / ".encoder_cache.fedcba9876543210.tmp"
    held.write_bytes(b"half")
    (tmp_path / "short" / ENTRY).write_bytes(b"".join(entry())[:-1])
    (tmp_path / "empty-file" / ENTRY).write_bytes(b"")
    (tmp_path / "foreign" / "notes.tmp").write_text("mine")
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert opened(tmp_path).sweep() == 3
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == {
        f"good/{ENTRY}",
        f"writing/{held.name}",
        "foreign/notes.tmp",
    }


def test_folders_of_look_ups_go_and_strangers_folders_stay(tmp_path):
    for name in (DIGEST, "somebody-elses"):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ("ab" * 32)).mkdir()
    opened(tmp_path).expire()
    assert {path.name for path in tmp_path.iterdir()} == {"somebody-elses", "ab" * 32}


def test_many_writers_and_an_expirer_at_once(tmp_path):
    folders = [opened(tmp_path, max_age_s=0, floor_s=0) for _ in range(3)]
    failures: list[Exception] = []

    def work(folder: EntryFolder, k: int) -> None:
        try:
            for i in range(150):
                folder.write(f"e{i % 5}", entry(k + 1))
                folder.sweep() if i % 10 == 0 else folder.expire()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(folder, k)) for k, folder in enumerate(folders * 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_directory_that_cannot_be_had_is_said_at_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"--ec-store: .*file"):
        opened(tmp_path / "file")
