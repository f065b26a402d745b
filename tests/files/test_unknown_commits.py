"""A blob is deleted at once only if its row certainly does not stand; nobody knows it here."""

import asyncio
import socket
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Connection, create_engine, event, select, text

from app.db import PostgresDatabase
from app.files.models import versions
from tests.files.helpers import (
    RawConnection,
    form_body,
    form_part,
    on_sqlite_only,
    refused,
)
from tests.files.support import wait_until
from tests.server import LoupeServer

CONTENT = b"the content of a file"


def blobs(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("blobs/*/*") if path.is_file()]


@contextmanager
def writes_held_up(directory: Path) -> Iterator[None]:
    connection = sqlite3.connect(directory / "loupe.db", isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    yield
    connection.execute("ROLLBACK")
    connection.close()


def send_upload(connection: RawConnection) -> None:
    body = form_body(form_part("fileName", b"a.txt"), form_part("file", CONTENT, "a.txt"))
    connection.send_upload_head(f"Content-Length: {len(body)}")
    connection.send(body)


def check_is_stored(server: LoupeServer, directory: Path) -> None:
    [key] = wait_until(lambda: server.rows(select(versions.c.blob_key)), "the row")[0]
    [blob] = blobs(directory)
    assert (blob.name, blob.read_bytes()) == (key, CONTENT)


async def _cancel_requests() -> int:
    """As the server does with those that outlast its shutdown."""
    tasks = [task for task in asyncio.all_tasks() if "run_asgi" in repr(task.get_coro())]
    for task in tasks:
        task.cancel()
    return len(tasks)


@on_sqlite_only
def test_upload_whose_request_is_cancelled_while_it_is_committed_is_stored(
    server: LoupeServer, tmp_path: Path
) -> None:
    with RawConnection(server.url) as connection:
        with writes_held_up(tmp_path):
            send_upload(connection)
            wait_until(lambda: blobs(tmp_path), "the blob")
            assert server.run(_cancel_requests()) == 1
        check_is_stored(server, tmp_path)


@on_sqlite_only
def test_upload_whose_client_hangs_up_while_it_is_committed_is_stored(
    server: LoupeServer, tmp_path: Path
) -> None:
    with writes_held_up(tmp_path), RawConnection(server.url) as connection:
        send_upload(connection)
        wait_until(lambda: blobs(tmp_path), "the blob")
        connection.socket.shutdown(socket.SHUT_RDWR)
    check_is_stored(server, tmp_path)


@contextmanager
def connection_lost_at_commit(server: LoupeServer, *, is_committed: bool) -> Iterator[None]:
    """Of the next transaction that inserted a version: the server ends it before or after."""
    db = server.resources.db
    assert isinstance(db, PostgresDatabase)
    admin = create_engine(db._engine.url, isolation_level="AUTOCOMMIT")
    lost = threading.Event()

    def lose_connection(connection: Connection) -> None:
        count = connection.exec_driver_sql("SELECT count(*) FROM file_versions").scalar_one()
        if lost.is_set() or not count:
            return
        lost.set()
        pid = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
        if is_committed:
            connection.connection.commit()
        with admin.connect() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": pid})
        if is_committed:  # the driver knows it, and would not ask again
            connection.exec_driver_sql("SELECT 1")

    event.listen(db._engine, "commit", lose_connection)
    yield
    event.remove(db._engine, "commit", lose_connection)
    admin.dispose()
    assert lost.is_set()


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.postgres
@pytest.mark.parametrize("is_committed", [False, True])
def test_upload_whose_connection_is_lost_at_its_commit_keeps_its_blob(
    server: LoupeServer, tmp_path: Path, is_committed: bool
) -> None:
    with connection_lost_at_commit(server, is_committed=is_committed):
        refused(server.upload(CONTENT, "a.txt"), 503)
    [blob] = blobs(tmp_path)
    rows = server.rows(select(versions.c.blob_key))
    assert [row.blob_key for row in rows] == [blob.name] * is_committed
    if is_committed:
        [listed] = server.client.get("/v1/files").json()
        assert httpx.get(listed["url"]).content == CONTENT


@on_sqlite_only
def test_uploads_that_are_refused_in_their_transaction_leave_no_blob(
    server: LoupeServer, tmp_path: Path
) -> None:
    once = {"useUniqueFileName": "false", "overwriteFile": "false"}
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: server.upload(CONTENT, "a.txt", **once), range(4)))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400]
    check_is_stored(server, tmp_path)
