"""Blobs on disk. Whatever storage there is keeps the same promises."""

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from app.ids import new_id
from app.storage.base import BlobMissing, Storage
from app.storage.local import LocalStorage

T = TypeVar("T")


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    storage = LocalStorage(tmp_path / "files")
    run(storage.open())
    return storage


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def put(storage: Storage, content: bytes) -> str:
    key = new_id()
    staged = storage.staging_dir / key
    staged.write_bytes(content)
    run(storage.put(staged, key))
    assert not staged.exists()
    return key


def read(storage: Storage, key: str, start: int, end: int) -> bytes:
    async def collect() -> bytes:
        return b"".join([piece async for piece in storage.read(key, start, end)])

    return run(collect())


@pytest.mark.parametrize("size", [1, 1000, 64 * 1024, 64 * 1024 + 1, 1_000_000])
def test_what_is_put_is_read_back(storage: Storage, size: int) -> None:
    content = os.urandom(size)
    key = put(storage, content)
    assert read(storage, key, 0, size) == content


@pytest.mark.parametrize(
    ("start", "end"), [(0, 0), (0, 1), (5, 5), (399_999, 400_000), (7, 300_007)]
)
def test_any_range_is_read(storage: Storage, start: int, end: int) -> None:
    content = os.urandom(400_000)
    key = put(storage, content)
    assert read(storage, key, start, end) == content[start:end]


def test_large_blob_comes_in_bounded_pieces(storage: Storage) -> None:
    key = put(storage, bytes(1_000_000))

    async def longest() -> int:
        return max([len(piece) async for piece in storage.read(key, 0, 1_000_000)])

    assert run(longest()) <= 256 * 1024


def test_key_without_a_blob_is_missing(storage: Storage) -> None:
    with pytest.raises(BlobMissing):
        read(storage, new_id(), 0, 1)

    async def copy() -> None:
        async with storage.local_copy(new_id()):
            pass

    with pytest.raises(BlobMissing):
        run(copy())


def test_blob_that_is_shorter_than_recorded_is_an_error_and_no_short_answer(
    storage: Storage,
) -> None:
    key = put(storage, b"short")
    with pytest.raises(BlobMissing):
        read(storage, key, 0, 6)


def test_local_copy_has_the_bytes(storage: Storage) -> None:
    key = put(storage, b"bytes")

    async def copy() -> bytes:
        async with storage.local_copy(key) as path:
            return path.read_bytes()

    assert run(copy()) == b"bytes"


def test_deleted_blob_is_gone_and_deleting_it_again_is_no_error(storage: Storage) -> None:
    key, kept = put(storage, b"gone"), put(storage, b"kept")
    run(storage.delete(key))
    run(storage.delete(key))
    with pytest.raises(BlobMissing):
        read(storage, key, 0, 1)
    assert read(storage, kept, 0, 4) == b"kept"


def test_opening_again_leaves_the_blobs(storage: LocalStorage, tmp_path: Path) -> None:
    key = put(storage, b"bytes")
    again = LocalStorage(tmp_path / "files")
    run(again.open())
    assert read(again, key, 0, 5) == b"bytes"


def test_check_leaves_nothing_and_fails_when_nothing_can_be_stored(storage: LocalStorage) -> None:
    run(storage.check())
    assert list(storage.staging_dir.iterdir()) == []
    storage.staging_dir.rmdir()
    with pytest.raises(OSError, match="No such file"):
        run(storage.check())


def test_bytes_and_then_the_directory_are_synced_before_put_returns(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    really = os.fsync

    def note(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    key = put(storage, b"bytes")
    [staged, directory] = synced
    assert staged == str(storage.staging_dir / key)
    assert directory.endswith(f"/blobs/{key[-2:]}")


def test_failed_sync_fails_the_put_and_is_not_tried_again(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[int] = []

    def fail(descriptor: int) -> None:
        tries.append(descriptor)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        put(storage, b"bytes")
    assert len(tries) == 1
    assert not [path for path in storage.staging_dir.parent.rglob("blobs/*/*") if path.is_file()]
