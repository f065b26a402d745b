"""Looking up what a URL names: kept in memory, and yet never stale."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from app.clock import Clock
from app.db import SqliteDatabase
from app.delivery.lookup import Lookup
from tests.conftest import Serve
from tests.delivery.support import is_not_found, put, visit
from tests.server import LoupeServer


class CountingDatabase(SqliteDatabase):
    reads = 0

    async def read(self, *args: Any, **kwargs: Any) -> Any:
        self.reads += 1
        return await super().read(*args, **kwargs)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_the_database_is_asked_once_until_anything_is_written(
    database_url: str, server: LoupeServer
) -> None:
    put(server, name="a.jpg", folder="/a")

    async def reads_of(lookup: Lookup, db: CountingDatabase, path: str) -> int:
        before = db.reads
        for _ in range(3):
            assert (await lookup.version_at(path, None) is None) == (path != "/a/a.jpg")
        return db.reads - before

    async def run() -> list[int]:
        db = CountingDatabase(database_url, Clock())
        lookup = Lookup(db)
        reads = [await reads_of(lookup, db, "/a/a.jpg"), await reads_of(lookup, db, "/a/a.jpg")]
        put(server, b"other", "b.txt")
        reads.append(await reads_of(lookup, db, "/a/a.jpg"))
        reads.append(await reads_of(lookup, db, "/a/unknown.jpg"))
        await db.close()
        return reads

    assert asyncio.run(run()) == [1, 0, 1, 3]


def test_what_is_changed_is_delivered_changed_at_once(server: LoupeServer) -> None:
    first = put(server, b"one", "a.txt", folder="/a")
    for content in (b"two", b"three"):
        assert visit(first["url"]).status_code == 200
        put(server, content, "a.txt", folder="/a")
        assert visit(first["url"]).content == content
    assert server.client.delete(f"/v1/files/{first['fileId']}").status_code == 204
    assert is_not_found(visit(first["url"]))
    put(server, b"four", "a.txt", folder="/a")
    assert visit(first["url"]).content == b"four"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_what_another_process_changes_is_seen_too(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    url = put(server)["url"]
    assert visit(url).status_code == 200
    with sqlite3.connect(tmp_path / "loupe.db") as connection:
        connection.execute("UPDATE file_versions SET is_published = 0")
    connection.close()
    assert is_not_found(visit(url))
