"""S3: objects and their names, checksums, parts, and what a failing server does."""

import asyncio
import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from app.ids import new_id
from app.storage.base import BlobMissing, StorageUnavailable
from app.storage.s3 import S3Storage
from tests.emulators.s3 import S3Emulator
from tests.server import EventLoop
from tests.storage.support import PREFIX, Stored, opened

NOTHING = "47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="  # the checksum of no bytes
LARGE = os.urandom(64 * 1024) * 320  # 20 MiB: three parts


@pytest.fixture
def bucket(s3: S3Emulator) -> str:
    return s3.create_bucket()


@pytest.fixture
def stored(bucket: str, tmp_path: Path, event_loop_thread: EventLoop) -> Iterator[Stored]:
    with opened(S3Storage(bucket, PREFIX, tmp_path / "staging"), event_loop_thread) as storage:
        yield storage


def test_a_key_is_an_object_under_the_prefix_and_its_last_digits(
    stored: Stored, s3: S3Emulator, bucket: str
) -> None:
    key = stored.put(b"x")
    assert s3.objects(bucket) == {f"{PREFIX}/{key[-2:]}/{key}": b"x"}


def test_no_prefix_is_a_prefix_too(
    s3: S3Emulator, bucket: str, tmp_path: Path, event_loop_thread: EventLoop
) -> None:
    with opened(S3Storage(bucket, "", tmp_path / "staging"), event_loop_thread) as stored:
        key = stored.put(b"x")
        assert stored.keys() == [key]
        assert list(s3.objects(bucket)) == [f"{key[-2:]}/{key}"]


def test_what_others_keep_in_the_bucket_is_not_listed(
    stored: Stored, s3: S3Emulator, bucket: str
) -> None:
    key = stored.put(b"x")
    other = new_id()
    for name in (
        f"{PREFIX}/readme.txt",
        f"{PREFIX}/{other}",
        f"{PREFIX}/zz/{other}",
        f"{PREFIX}/deeper/{other[-2:]}/{other}",
        f"{PREFIX}er/{other[-2:]}/{other}",
        f"{other[-2:]}/{other}",
    ):
        s3.client.put_object(Bucket=bucket, Key=name, Body=b"", ChecksumSHA256=NOTHING)
    assert stored.keys() == [key]


def test_small_files_are_put_at_once_and_large_ones_in_parts(
    stored: Stored, s3: S3Emulator, bucket: str
) -> None:
    s3.calls.clear()
    stored.put(b"x")
    assert s3.calls == ["put"]
    s3.calls.clear()
    stored.put(LARGE)
    assert s3.calls == ["create_parts", *["upload_part"] * 3, "complete"]
    assert s3.unfinished(bucket) == []


@pytest.mark.parametrize(("operation", "content"), [("put", b"x" * 1000), ("upload_part", LARGE)])
def test_bytes_that_change_on_their_way_are_refused(
    stored: Stored, s3: S3Emulator, bucket: str, operation: str, content: bytes
) -> None:
    s3.faults[operation] = "corrupt"
    with pytest.raises(StorageUnavailable, match="BadDigest"):
        stored.put(content)
    assert s3.objects(bucket) == {}
    assert s3.unfinished(bucket) == []


@pytest.mark.parametrize("operation", ["upload_part", "complete"])
@pytest.mark.parametrize("fault", ["denied", "garbage"])
def test_an_upload_in_parts_that_fails_leaves_no_part(
    stored: Stored, s3: S3Emulator, bucket: str, operation: str, fault: str
) -> None:
    s3.faults[operation] = fault
    with pytest.raises(StorageUnavailable):
        stored.put(LARGE)
    assert s3.objects(bucket) == {}
    assert s3.unfinished(bucket) == []


def test_parts_whose_process_died_are_removed_when_they_are_old(
    stored: Stored, s3: S3Emulator, bucket: str
) -> None:
    key = new_id()
    ours, others = f"{PREFIX}/{key[-2:]}/{key}", f"{PREFIX}/something-else"
    for name in (ours, others):
        s3.client.create_multipart_upload(Bucket=bucket, Key=name)
    # The emulator calls every upload an old one.
    stored.run(stored.storage.remove_unfinished(datetime(2000, 1, 1, tzinfo=UTC)))
    assert sorted(s3.unfinished(bucket)) == sorted([ours, others])
    stored.run(stored.storage.remove_unfinished(datetime.now(UTC) - timedelta(hours=1)))
    assert s3.unfinished(bucket) == [others]


@pytest.mark.parametrize("fault", ["unavailable", "denied"])
def test_a_failing_server_makes_the_storage_unavailable(
    stored: Stored, s3: S3Emulator, fault: str
) -> None:
    key = stored.put(b"x")
    for operation in ("put", "get", "head", "delete", "list"):
        s3.faults[operation] = fault
    staged = stored.stage(b"y")

    async def copy() -> None:
        async with stored.storage.local_copy(key):
            pass

    async def all_ways() -> Any:
        return await asyncio.gather(
            stored.storage.put(staged, new_id()),
            anext(stored.storage.read(key, 0, 1)),
            copy(),
            stored.storage.delete(key),
            anext(stored.storage.list_blobs()),
            stored.storage.check(),
            return_exceptions=True,
        )

    answers = stored.run(all_ways())
    assert [type(answer) for answer in answers] == [StorageUnavailable] * 6
    assert stored.staged() == [staged.path.name]


def test_a_server_that_fails_for_a_moment_is_asked_again(stored: Stored, s3: S3Emulator) -> None:
    s3.calls.clear()
    s3.faults["put"] = "unavailable"

    async def put() -> str:
        key = new_id()
        putting = asyncio.create_task(stored.storage.put(stored.stage(b"x"), key))
        await asyncio.to_thread(s3.wait_for, "put")
        s3.faults.clear()
        await putting
        return key

    assert stored.has(stored.run(put()))


@pytest.mark.parametrize("fault", ["truncate", "garbage"])
def test_a_reply_that_is_not_the_blob_is_never_taken_for_it(
    stored: Stored, s3: S3Emulator, fault: str
) -> None:
    content = os.urandom(1_000_000)
    key = stored.put(content)
    s3.faults["get"] = fault

    async def copy() -> None:
        async with stored.storage.local_copy(key):
            raise AssertionError

    with pytest.raises((StorageUnavailable, BlobMissing)):
        stored.read(key, 0, len(content))
    if fault == "truncate":
        with pytest.raises(StorageUnavailable):
            stored.run(copy())
    assert stored.staged() == []


def test_a_hanging_server_fails_the_check_in_time(
    s3: S3Emulator, bucket: str, tmp_path: Path, event_loop_thread: EventLoop
) -> None:
    storage = S3Storage(bucket, "", tmp_path / "staging", check_seconds=0.5)
    with opened(storage, event_loop_thread) as stored:
        s3.faults["head"] = "hang"
        with pytest.raises(StorageUnavailable, match="in time"):
            stored.run(storage.check())
        s3.faults.clear()
        stored.run(storage.check())


def test_a_put_that_is_cancelled_does_not_block_the_next(stored: Stored, s3: S3Emulator) -> None:
    s3.calls.clear()
    s3.faults["put"] = "hang"

    async def cancel() -> None:
        putting = asyncio.create_task(stored.storage.put(stored.stage(b"x"), new_id()))
        await asyncio.to_thread(s3.wait_for, "put")
        putting.cancel()
        await asyncio.gather(putting, return_exceptions=True)

    stored.run(cancel())
    s3.faults.clear()
    assert stored.has(stored.put(b"y"))
