"""The limit: what Starlette, uvloop, sqlite3 and orjson give when hardly anything is asked of them.

POST /upload takes a raw body to a synced file and a row that is committed with its neighbours';
GET /files and /files/{id} read rows in the event loop; GET /thumbnail sends LIMIT_THUMBNAIL.
Not a product: no authentication, no form, no checks. LIMIT_DIR: its folder.
"""

import asyncio
import itertools
import os
import queue
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

DIRECTORY = Path(os.environ["LIMIT_DIR"])
THUMBNAIL = os.environ.get("LIMIT_THUMBNAIL", "")
FILES = 10_000
SYNC_THREADS = 8
SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, name TEXT, path TEXT, size INT, width INT, height INT, mime TEXT,
    tags TEXT, created_at TEXT
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS files_created_at ON files (created_at, id);
CREATE TABLE IF NOT EXISTS uploads (
    id TEXT PRIMARY KEY, name TEXT, path TEXT, size INT, width INT, height INT, mime TEXT,
    tags TEXT, created_at TEXT
) WITHOUT ROWID;
"""

Row = tuple[Any, ...]


def _connect() -> sqlite3.Connection:
    connection = sqlite3.connect(
        DIRECTORY / "limit.db", isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def _fill(connection: sqlite3.Connection) -> None:
    connection.executescript(SCHEMA)
    connection.execute("BEGIN")
    connection.executemany(
        "INSERT INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", map(_row, range(1, FILES + 1))
    )
    connection.execute("COMMIT")


def _row(number: int) -> Row:
    name = f"photo-{number}.jpg"
    tags = orjson.dumps(["summer", "beach", f"t{number % 100}"]).decode()
    created_at = f"2026-01-01T{number // 3600:02d}:{number // 60 % 60:02d}:{number % 60:02d}.000Z"
    return (
        f"{number:024x}",
        name,
        f"/library/{name}",
        3_000_000,
        4000,
        3000,
        "image/jpeg",
        tags,
        created_at,
    )


class _Write(NamedTuple):
    row: Row
    future: "asyncio.Future[None]"
    loop: asyncio.AbstractEventLoop


class Writer:
    """One thread; each commit takes all rows that wait."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[_Write] = queue.SimpleQueue()
        threading.Thread(target=self._write_all, daemon=True).start()

    async def insert(self, row: Row) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiting.put(_Write(row, future, loop))
        await future

    def _write_all(self) -> None:
        connection = _connect()
        while True:
            group = [self._waiting.get()]
            while not self._waiting.empty():
                group.append(self._waiting.get())
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(
                "INSERT INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [write.row for write in group],
            )
            connection.execute("COMMIT")
            group[0].loop.call_soon_threadsafe(_answer, group)


def _answer(group: list[_Write]) -> None:
    for write in group:
        if not write.future.done():
            write.future.set_result(None)


reading = _connect()
_fill(reading)
writer = Writer()
sync_threads = ThreadPoolExecutor(SYNC_THREADS)
numbers = itertools.count(1)
(DIRECTORY / "uploads").mkdir()


async def upload(request: Request) -> Response:
    file_id = f"{next(numbers):024x}"
    path = DIRECTORY / "uploads" / file_id
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    size = 0
    async for chunk in request.stream():
        size += os.write(descriptor, chunk)
    await asyncio.get_running_loop().run_in_executor(sync_threads, _sync, descriptor)
    created_at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
    row = (file_id, "bench.jpg", "/bench.jpg", size, 0, 0, "image/jpeg", "[]", created_at)
    await writer.insert(row)
    return _json(_file_object(row))


def _sync(descriptor: int) -> None:
    os.fsync(descriptor)
    os.close(descriptor)


async def details(request: Request) -> Response:
    row = reading.execute(
        "SELECT * FROM files WHERE id = ?", (request.path_params["file_id"],)
    ).fetchone()
    return _json(_file_object(row))


async def list_files(request: Request) -> Response:
    rows = reading.execute("SELECT * FROM files ORDER BY created_at, id LIMIT 100")
    return _json([_file_object(row) for row in rows])


async def thumbnail(request: Request) -> Response:
    return FileResponse(THUMBNAIL, media_type="image/jpeg")


def _file_object(row: Row) -> dict[str, Any]:
    """With the keys that Loupe's has."""
    file_id, name, path, size, width, height, mime, tags, created_at = row
    return {
        "type": "file",
        "fileId": file_id,
        "name": name,
        "filePath": path,
        "tags": orjson.loads(tags),
        "AITags": None,
        "versionInfo": {"id": file_id, "name": "Version 1"},
        "embeddedMetadata": None,
        "customCoordinates": None,
        "customMetadata": {},
        "isPrivateFile": False,
        "isPublished": True,
        "url": f"http://127.0.0.1:8000/demo{path}",
        "fileType": "image",
        "mime": mime,
        "size": size,
        "createdAt": created_at,
        "updatedAt": created_at,
        "thumbnail": f"http://127.0.0.1:8000/demo/tr:n-media_library_thumbnail{path}",
        "height": height,
        "width": width,
        "hasAlpha": False,
    }


def _json(content: object) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


app = Starlette(
    routes=[
        Route("/upload", upload, methods=["POST"]),
        Route("/files", list_files),
        Route("/files/{file_id}", details),
        Route("/thumbnail", thumbnail),
    ]
)
