"""What every storage has to do."""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.ids import new_id
from app.storage.base import BlobMissing, StorageUnavailable
from tests.server import EventLoop
from tests.storage.support import STORAGES, Stored, opened_storage

LARGE = os.urandom(64 * 1024) * 320  # 20 MiB: more than S3 is given at once
PIECES = os.urandom(1_000_000)


@pytest.fixture(params=STORAGES)
def stored(
    request: pytest.FixtureRequest, tmp_path: Path, event_loop_thread: EventLoop
) -> Iterator[Stored]:
    with opened_storage(request.param, request, tmp_path, event_loop_thread) as opened:
        yield opened


def test_what_is_put_can_be_read_and_nothing_stays_staged(stored: Stored) -> None:
    key = stored.put(b"some bytes")
    assert stored.read(key, 0, 10) == b"some bytes"
    assert stored.staged() == []


@pytest.mark.parametrize(
    ("start", "end"), [(0, 1), (0, 1_000_000), (1, 300_001), (999_999, 1_000_000), (5, 6)]
)
def test_a_range_is_read_exactly(stored: Stored, start: int, end: int) -> None:
    key = stored.put(PIECES)
    assert stored.read(key, start, end) == PIECES[start:end]


def test_a_long_read_comes_in_pieces(stored: Stored) -> None:
    key = stored.put(PIECES)

    async def sizes() -> list[int]:
        return [len(piece) async for piece in stored.storage.read(key, 0, len(PIECES))]

    assert max(stored.run(sizes())) <= 256 * 1024


def test_a_reader_may_stop_early(stored: Stored) -> None:
    key = stored.put(PIECES)

    async def first() -> bytes:
        async with aclosing(stored.storage.read(key, 0, len(PIECES))) as pieces:
            async for piece in pieces:
                return piece
        return b""

    for _ in range(40):
        assert PIECES.startswith(stored.run(first()))
    assert stored.read(key, 0, len(PIECES)) == PIECES


def test_a_reader_may_be_cancelled(stored: Stored) -> None:
    key = stored.put(PIECES)

    async def read_on() -> None:
        while True:
            async for _ in stored.storage.read(key, 0, len(PIECES)):
                await asyncio.sleep(0)

    async def cancel() -> None:
        for wait_seconds in (0, 0.002, 0.005, 0.02):
            task = asyncio.create_task(read_on())
            await asyncio.sleep(wait_seconds)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    stored.run(cancel())
    assert stored.read(key, 0, len(PIECES)) == PIECES


def test_a_large_file_is_stored_whole(stored: Stored) -> None:
    key = stored.put(LARGE)
    assert stored.read(key, 0, len(LARGE)) == LARGE
    assert stored.staged() == []


def test_many_are_stored_and_read_at_once(stored: Stored) -> None:
    async def round_trip(number: int) -> bool:
        content = f"content {number}".encode() * 1000
        key = new_id()
        await stored.storage.put(stored.stage(content), key)
        pieces = stored.storage.read(key, 0, len(content))
        return b"".join([piece async for piece in pieces]) == content

    async def all_trips() -> list[bool]:
        return await asyncio.gather(*(round_trip(number) for number in range(50)))

    assert stored.run(all_trips()) == [True] * 50


def test_a_local_copy_lasts_as_long_as_its_context(stored: Stored) -> None:
    key = stored.put(PIECES)

    async def copy() -> tuple[bytes, Path]:
        async with stored.storage.local_copy(key) as path:
            return await asyncio.to_thread(path.read_bytes), path

    content, _ = stored.run(copy())
    assert content == PIECES
    assert stored.staged() == []
    assert stored.has(key)


def test_a_missing_blob_is_missing_however_it_is_asked_for(stored: Stored) -> None:
    async def copy() -> None:
        async with stored.storage.local_copy(new_id()):
            pass

    with pytest.raises(BlobMissing):
        stored.read(new_id(), 0, 10)
    with pytest.raises(BlobMissing):
        stored.run(copy())
    assert stored.staged() == []


@pytest.mark.parametrize("start", [5, 10, 4])
def test_a_blob_that_is_too_short_is_missing(stored: Stored, start: int) -> None:
    key = stored.put(b"12345")
    with pytest.raises(BlobMissing):
        stored.read(key, start, 20)


def test_deleting_twice_is_no_error(stored: Stored) -> None:
    key, other = stored.put(b"x"), stored.put(b"y")
    stored.run(stored.storage.delete(key))
    stored.run(stored.storage.delete(key))
    assert not stored.has(key)
    assert stored.has(other)


def test_every_blob_is_listed_once_with_its_age(stored: Stored) -> None:
    before = datetime.now(UTC) - timedelta(seconds=2)
    keys = sorted(stored.put(b"x") for _ in range(25))

    async def times() -> list[datetime]:
        return [blob.modified_at async for page in stored.storage.list_blobs() for blob in page]

    assert stored.keys() == keys
    assert all(before <= each <= before + timedelta(seconds=60) for each in stored.run(times()))


def test_an_empty_storage_lists_nothing(stored: Stored) -> None:
    assert stored.keys() == []


def test_only_old_staged_files_are_removed(stored: Stored) -> None:
    old, new = (stored.storage.staging_dir / name for name in ("old", "new"))
    for path in (old, new):
        path.write_bytes(b"abandoned")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    stored.run(stored.storage.remove_unfinished(datetime.now(UTC) - timedelta(hours=1)))
    assert stored.staged() == [new.name]


def test_a_healthy_storage_passes_its_check_also_many_at_once(stored: Stored) -> None:
    async def check() -> None:
        await asyncio.gather(*(stored.storage.check() for _ in range(20)))

    stored.run(check())
    assert stored.staged() == []


def test_a_file_that_is_not_there_cannot_be_put(stored: Stored) -> None:
    staged = stored.stage(PIECES)
    staged.path.unlink()
    with pytest.raises(StorageUnavailable):
        stored.run(stored.storage.put(staged, new_id()))
    staged.discard()
    assert stored.keys() == []


def test_blobs_belong_to_who_claimed_them_first(stored: Stored) -> None:
    stored.put(b"x")
    assert stored.run(stored.storage.claim("one")) == "one"
    assert stored.run(stored.storage.claim("two")) == "one"
    assert stored.run(stored.storage.claim("one")) == "one"
    assert len(stored.keys()) == 1
