"""What a death in the middle leaves behind is cleared away, and nothing else ever is."""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from datetime import datetime, timedelta

import pytest
import structlog
from sqlalchemy import func, select, update

from app.clock import Clock
from app.db import Tx
from app.files.models import versions
from app.files.service import delete_file
from app.files.sweep import CLOCKS_DIFFER_SECONDS, STORING_SECONDS, Sweep
from app.ids import new_id
from app.keys import generated_secrets
from app.storage.base import BlobMissing, StoredBlob
from tests.conftest import Serve
from tests.emulators.s3 import S3Emulator
from tests.server import LoupeServer
from tests.storage.support import STORAGES, staged

CONTENT = b"the content of a file"
# With the default deadline nothing that is older can get a row.
LATER = timedelta(hours=3)


class Movable(Clock):
    ahead = timedelta()

    def now(self) -> datetime:
        return super().now() + self.ahead

    def wall(self) -> datetime:
        return super().wall() + self.ahead


class WallSetForward(Clock):
    def wall(self) -> datetime:
        return super().wall() + timedelta(days=1)


class ClockSetForwardBeforeTheStart(Clock):
    def now(self) -> datetime:
        return super().now() + timedelta(days=1)


@pytest.fixture(params=STORAGES)
def storage_url(request: pytest.FixtureRequest) -> str:
    if request.param == "local":
        return ""
    s3: S3Emulator = request.getfixturevalue("s3")
    return f"s3://{s3.create_bucket()}/prefix"


@pytest.fixture
def server(storage_url: str, serve: Serve) -> LoupeServer:
    return serve(storage_url=storage_url, clock=Movable())


def _upload(server: LoupeServer) -> str:
    """The file's id, which is its first version's too."""
    answer = server.upload(CONTENT, "file.txt")
    assert answer.status_code == 200, answer.text
    file_id: str = answer.json()["fileId"]
    return file_id


def _blob_key(server: LoupeServer, file_id: str) -> str:
    key: str = server.rows(select(versions.c.blob_key).where(versions.c.id == file_id))[0][0]
    return key


def _orphan(server: LoupeServer) -> str:
    """The key of a blob whose process died before it could insert a row."""
    key = new_id()
    storage = server.resources.storage
    server.run(storage.put(staged(storage, CONTENT), key))
    return key


def _has_blob(server: LoupeServer, key: str) -> bool:
    async def read() -> bytes:
        pieces = server.resources.storage.read(key, 0, len(CONTENT))
        return b"".join([piece async for piece in pieces])

    try:
        return server.run(read()) == CONTENT
    except BlobMissing:
        return False


def _sweep_later(server: LoupeServer, *, times: int = 1, batch_rows: int = 500) -> None:
    """When all that is stored is older than any upload may be."""
    _move_clock(server)
    _sweep(server, times=times, batch_rows=batch_rows)


def _move_clock(server: LoupeServer) -> None:
    clock = server.resources.db.clock
    assert isinstance(clock, Movable)
    clock.ahead = LATER


def _sweep(server: LoupeServer, *, times: int = 1, batch_rows: int = 500) -> None:
    sweep = _new_sweep(server, batch_rows)
    for _ in range(times):
        server.run(sweep.sweep())


def _new_sweep(server: LoupeServer, batch_rows: int = 500) -> Sweep:
    resources = server.resources
    deadline_seconds = resources.settings.upload_deadline_seconds
    return Sweep(resources.db, resources.storage, deadline_seconds, batch_rows=batch_rows)


def test_an_old_blob_without_a_row_is_deleted_and_files_keep_theirs(server: LoupeServer) -> None:
    file_id, orphan = _upload(server), _orphan(server)
    _sweep_later(server)
    assert not _has_blob(server, orphan)
    assert _has_blob(server, _blob_key(server, file_id))


@pytest.mark.parametrize("clock", [Clock, WallSetForward, ClockSetForwardBeforeTheStart])
def test_a_young_blob_may_be_about_to_get_its_row(
    storage_url: str, serve: Serve, clock: type[Clock]
) -> None:
    server = serve(storage_url=storage_url, clock=clock())
    orphan = _orphan(server)
    _sweep(server)
    assert _has_blob(server, orphan)


def test_many_are_swept_in_batches(server: LoupeServer) -> None:
    files = [_upload(server) for _ in range(5)]
    orphans = [_orphan(server) for _ in range(20)]
    _sweep_later(server, batch_rows=3)
    assert not any(_has_blob(server, key) for key in orphans)
    assert all(_has_blob(server, _blob_key(server, file_id)) for file_id in files)


def test_replicas_may_sweep_at_the_same_time(server: LoupeServer) -> None:
    file_id = _upload(server)
    orphans = [_orphan(server) for _ in range(20)]

    async def sweep_thrice() -> None:
        _move_clock(server)
        sweeps = [_new_sweep(server) for _ in range(3)]
        await asyncio.gather(*(sweep.sweep() for sweep in sweeps))

    server.run(sweep_thrice())
    assert not any(_has_blob(server, key) for key in orphans)
    assert _has_blob(server, _blob_key(server, file_id))


def test_a_deletion_that_died_after_its_commit_is_finished(server: LoupeServer) -> None:
    file_id = _upload(server)
    key = _blob_key(server, file_id)
    rules = server.resources.tagging.rules
    server.write(lambda tx: delete_file(tx, file_id, rules))
    assert _has_blob(server, key)
    _sweep_later(server)
    assert not _has_blob(server, key)


def test_files_of_another_database_are_never_swept(server: LoupeServer) -> None:
    _sweep_later(server)
    orphan = _orphan(server)
    server.write(
        lambda tx: tx.execute(
            update(generated_secrets)
            .where(generated_secrets.c.name == "library_id")
            .values(value=new_id())
        )
    )
    _sweep_later(server, times=2)
    assert _has_blob(server, orphan)


def test_a_row_whose_blob_is_missing_is_only_told(server: LoupeServer) -> None:
    _sweep_later(server)
    files = [_upload(server) for _ in range(5)]
    key = _blob_key(server, files[3])
    server.run(server.resources.storage.delete(key))
    with structlog.testing.capture_logs() as logs:
        _sweep_later(server, times=3, batch_rows=2)
    told = [line["key"] for line in logs if line["event"] == "a file's blob is missing"]
    assert told == [key]
    assert server.rows(select(func.count()).select_from(versions))[0][0] == 5


def test_staged_files_are_swept_when_they_are_old(server: LoupeServer) -> None:
    staged = server.resources.storage.staging_dir / new_id()
    staged.write_bytes(b"abandoned")
    _sweep_later(server)
    assert not staged.exists()


def test_a_server_sweeps_when_it_starts(storage_url: str, serve: Serve) -> None:
    first = serve(storage_url=storage_url)
    orphan = _orphan(first)
    first.stop()
    clock = Movable()
    clock.ahead = LATER
    server = serve(storage_url=storage_url, clock=clock)
    deadline = time.monotonic() + 20
    while _has_blob(server, orphan):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("deadline_seconds", [1.0, 3600.0, 604_800.0])
def test_what_may_still_get_its_row_is_kept_whatever_the_deadline_is(
    storage_url: str, serve: Serve, deadline_seconds: float
) -> None:
    clock = Movable()
    server = serve(storage_url=storage_url, clock=clock, upload_deadline_seconds=deadline_seconds)
    orphan = _orphan(server)
    clock.ahead = timedelta(seconds=deadline_seconds + STORING_SECONDS)
    _sweep(server)
    assert _has_blob(server, orphan)
    clock.ahead += timedelta(seconds=CLOCKS_DIFFER_SECONDS + 60)
    _sweep(server)
    assert not _has_blob(server, orphan)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_row_that_is_being_inserted_while_the_sweep_looks_keeps_its_blob(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a process that is frozen in the middle of it, for longer than any upload lasts."""
    server = serve(clock=Movable())
    orphan, key = _orphan(server), _blob_key(server, _upload(server))
    begun, go_on = threading.Event(), threading.Event()
    list_blobs = server.resources.storage.list_blobs
    inserting = []

    def name_the_orphan(tx: Tx) -> None:
        begun.set()
        assert go_on.wait(30)
        tx.execute(update(versions).where(versions.c.blob_key == key).values(blob_key=orphan))

    async def list_while_it_is_inserted() -> AsyncGenerator[list[StoredBlob]]:
        inserting.append(asyncio.create_task(server.resources.db.write(name_the_orphan)))
        assert await asyncio.to_thread(begun.wait, 30)
        asyncio.get_running_loop().call_later(0.3, go_on.set)
        async for page in list_blobs():
            yield page

    monkeypatch.setattr(server.resources.storage, "list_blobs", list_while_it_is_inserted)
    _sweep_later(server)
    assert [task.exception() for task in inserting] == [None]
    assert _has_blob(server, orphan)
