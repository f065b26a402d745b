"""Loupe as users run it, and a media library in it that was not uploaded one by one."""

import base64
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import Connection, Engine, insert, text

from app.db import is_sqlite, migration_engine
from app.files.models import folders
from app.settings import DEVELOPMENT_PRIVATE_KEY
from bench.process import PROJECT, BenchFailed, free_port, running

AUTHORIZATION = "Basic " + base64.b64encode(f"{DEVELOPMENT_PRIVATE_KEY}:".encode()).decode()
UPLOAD_FIELDS = "fileName=bench.jpg;tags=summer,beach;folder=/bench;useUniqueFileName=true"
MIGRATE_SECONDS = 120
FOLDER_ID = "0" * 24
FOLDER = "/library"


# The database makes the rows itself: a million of them sent to it would take minutes.
NUMBERS = """
WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :count)
"""
INSERT_FILES = (
    "INSERT INTO files (id, folder_id, name, current_version_id, created_at)"
    + NUMBERS
    + "SELECT {id}, :folder, 'photo-' || n || '.jpg', {id}, {created_at} FROM numbers"
)
INSERT_VERSIONS = (
    "INSERT INTO file_versions (id, file_id, number, blob_key, size_bytes, sha256, mime, is_image,"
    " width_px, height_px, has_alpha, orientation, is_private, is_published, tags, created_at,"
    " updated_at)"
    + NUMBERS
    + "SELECT {id}, {id}, 1, {id}, :size, '00000000' || {id} || {id} || '00000000', 'image/jpeg',"
    " TRUE, 4000, 3000, FALSE, 1, FALSE, TRUE, {tags}, {created_at}, {created_at} FROM numbers"
)
SQL_TERMS = {
    "sqlite": {
        "id": "printf('%024x', n)",
        "created_at": "(1767225600 + n) * 1000000",
        "tags": "json_array('summer', 'beach', 't' || (n % 100))",
    },
    "postgresql": {
        "id": "lpad(to_hex(n), 24, '0')",
        "created_at": "to_timestamp(1767225600 + n)",
        "tags": "jsonb_build_array('summer', 'beach', 't' || (n % 100))",
    },
}


@dataclass(frozen=True, slots=True)
class Loupe:
    url: str
    pid: int


@contextmanager
def serving(directory: Path, **settings: str) -> Iterator[Loupe]:
    """`python -m app serve` on data in `directory`. Without settings it calls no provider."""
    port = free_port()
    environment = _environment(directory, port, settings)
    url = f"http://127.0.0.1:{port}"
    with running(
        [sys.executable, "-m", "app", "serve"],
        log=directory / "loupe.log",
        ready_url=f"{url}/readyz",
        environment=environment,
    ) as pid:
        yield Loupe(url, pid)


def migrate(directory: Path, **settings: str) -> None:
    """Raises BenchFailed."""
    environment = _environment(directory, 8000, settings)
    done = subprocess.run(
        [sys.executable, "-m", "app", "migrate"],
        env={"PATH": os.environ["PATH"], **environment},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=MIGRATE_SECONDS,
    )
    if done.returncode:
        raise BenchFailed(f"The schema could not be made: {done.stderr.strip()[-500:]}")


def _environment(directory: Path, port: int, settings: Mapping[str, str]) -> dict[str, str]:
    return {
        "AWS_EC2_METADATA_DISABLED": "true",
        "LOUPE_PORT": str(port),
        "LOUPE_DATA_DIR": str(directory),
        "LOUPE_GOOGLE_AUTO_TAGGING": "off",
        "LOUPE_AWS_AUTO_TAGGING": "off",
        **settings,
    }


def sqlite_url(directory: Path) -> str:
    return f"sqlite:///{directory / 'loupe.db'}"


# --- A library of many files ---------------------------------------------------------------------


def file_id(number: int) -> str:
    """Numbers start at 1."""
    return f"{number:024x}"


def file_path(number: int) -> str:
    return f"{FOLDER}/photo-{number}.jpg"


def fill(url: str, count: int, picture: Path, storage: Path | None = None) -> None:
    """Puts `count` pictures into a migrated database.

    storage: a data directory, where each gets a hard link to `picture` as its blob; else the
    files can be listed but not delivered.
    """
    engine = migration_engine(url)
    try:
        with engine.begin() as connection:
            _insert(connection, count, picture.stat().st_size)
        if not is_sqlite(url):
            _gather_statistics(engine)
    finally:
        engine.dispose()
    if storage is not None:
        _link_blobs(storage, count, picture)


def _insert(connection: Connection, count: int, size_bytes: int) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    connection.execute(
        insert(folders).values(id=FOLDER_ID, path=FOLDER, created_at=start, updated_at=start)
    )
    terms = SQL_TERMS[connection.dialect.name]
    values = {"count": count, "folder": FOLDER_ID, "size": size_bytes}
    for statement in (INSERT_FILES, INSERT_VERSIONS):
        connection.execute(text(statement.format(**terms)), values)


def _gather_statistics(engine: Engine) -> None:
    """PostgreSQL does so by itself, but only after a minute."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("VACUUM ANALYZE")


def _link_blobs(storage: Path, count: int, picture: Path) -> None:
    blobs = storage / "files" / "blobs"
    for number in range(256):
        (blobs / f"{number:02x}").mkdir(parents=True, exist_ok=True)
    for number in range(1, count + 1):
        key = file_id(number)
        (blobs / key[-2:] / key).hardlink_to(picture)
