"""The local disk: in which order things are made durable, and what its failures do."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.ids import new_id
from app.storage.base import StorageUnavailable
from app.storage.local import LocalStorage
from tests.server import EventLoop
from tests.storage.support import Stored, opened

# Of what the kernel does, only this has no other part that could fail on demand.
Sync = Callable[[int], None]


@pytest.fixture
def stored(tmp_path: Path, event_loop_thread: EventLoop) -> Iterator[Stored]:
    with opened(LocalStorage(tmp_path / "files"), event_loop_thread) as storage:
        yield storage


def _is_directory(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def _fail(monkeypatch: pytest.MonkeyPatch, code: int, *, directory: bool) -> list[int]:
    """Makes fsync fail, of files or of directories. Returns a list that grows by each such call."""
    real: Sync = os.fsync
    calls = []

    def fsync(descriptor: int) -> None:
        if _is_directory(descriptor) is directory:
            calls.append(descriptor)
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return calls


def test_content_is_synced_before_its_name_and_the_name_before_the_answer(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    sync: Sync = os.fsync
    rename = os.rename

    def record_sync(descriptor: int) -> None:
        steps.append("sync directory" if _is_directory(descriptor) else "sync file")
        sync(descriptor)

    def record_rename(*paths: Path) -> None:
        steps.append("rename")
        rename(*paths)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    stored.put(b"x")
    assert steps == ["sync file", "rename", "sync directory"]


@pytest.mark.parametrize("directory", [False, True])
def test_after_a_failed_sync_nothing_is_stored_until_a_restart(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, directory: bool
) -> None:
    earlier = stored.put(b"earlier")
    with monkeypatch.context() as patched:
        calls = _fail(patched, errno.EIO, directory=directory)
        with pytest.raises(StorageUnavailable):
            stored.put(b"x")
        with pytest.raises(StorageUnavailable):
            stored.put(b"y")
        assert len(calls) == 1
    with pytest.raises(StorageUnavailable):
        stored.run(stored.storage.check())
    assert stored.keys() == [earlier]
    assert stored.read(earlier, 0, 7) == b"earlier"


@pytest.mark.parametrize("directory", [False, True])
def test_a_full_disk_is_a_disk_again_when_it_has_room(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, directory: bool
) -> None:
    with monkeypatch.context() as patched:
        _fail(patched, errno.ENOSPC, directory=directory)
        with pytest.raises(StorageUnavailable):
            stored.put(b"x")
    assert stored.keys() == []
    stored.run(stored.storage.check())
    assert stored.has(stored.put(b"y"))


def test_a_key_is_a_file_in_a_directory_of_its_last_digits(stored: Stored, tmp_path: Path) -> None:
    key = stored.put(b"x")
    assert (tmp_path / "files" / "blobs" / key[-2:] / key).read_bytes() == b"x"


def test_other_files_among_the_blobs_are_not_listed(stored: Stored, tmp_path: Path) -> None:
    (tmp_path / "files" / "blobs" / "00" / "README").write_bytes(b"x")
    assert stored.keys() == []


def test_a_directory_that_cannot_be_made_is_told(
    tmp_path: Path, event_loop_thread: EventLoop
) -> None:
    (tmp_path / "file").write_bytes(b"")
    storage = LocalStorage(tmp_path / "file" / "files")
    with pytest.raises(StorageUnavailable, match="Not a directory"):
        event_loop_thread.run(storage.open())


def test_a_disk_that_is_gone_fails_the_check(stored: Stored) -> None:
    stored.storage.staging_dir.rmdir()
    with pytest.raises(StorageUnavailable):
        stored.run(stored.storage.check())
    with pytest.raises(StorageUnavailable):
        stored.run(stored.storage.put(stored.stage(b"x"), new_id()))


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EOPNOTSUPP])
def test_what_is_not_in_memory_is_read_from_the_disk(
    stored: Stored, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    content = os.urandom(700_000)
    key = stored.put(content)

    def fail(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "preadv", fail)
    assert stored.read(key, 0, len(content)) == content
    assert stored.read(key, 1000, 400_000) == content[1000:400_000]


def test_what_is_in_memory_in_part_is_read_whole(
    stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(700_000)
    key = stored.put(content)
    read = os.preadv

    def read_half(descriptor: int, buffers: list[bytearray], start: int, flags: int) -> int:
        half = memoryview(buffers[0])[: len(buffers[0]) // 2]
        return read(descriptor, [half], start, flags)

    monkeypatch.setattr(os, "preadv", read_half)
    assert stored.read(key, 0, len(content)) == content
