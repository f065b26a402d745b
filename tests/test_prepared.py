"""Prepared statements give what SQLAlchemy would have given, on both databases."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from sqlalchemy import bindparam, insert, select
from sqlalchemy.exc import IntegrityError

from app.db import Tx
from app.files.models import files, folders, versions
from app.prepared import Prepared
from tests.test_db import Running

T = TypeVar("T")
CREATED_AT = datetime(2026, 2, 3, 4, 5, 6, 789012, tzinfo=UTC)
FOLDER = {"id": "f", "path": "/ä", "created_at": CREATED_AT, "updated_at": CREATED_AT}
FILE = {
    "id": "a",
    "folder_id": "f",
    "name": "ä.jpg",
    "current_version_id": "a",
    "created_at": CREATED_AT,
}
VERSION: dict[str, Any] = {
    "id": "a",
    "file_id": "a",
    "number": 1,
    "blob_key": "b",
    "size_bytes": 2**40,
    "sha256": "0" * 64,
    "mime": "image/jpeg",
    "is_image": True,
    "width_px": 3,
    "height_px": None,
    "has_alpha": False,
    "orientation": 1,
    "is_private": False,
    "is_published": True,
    "tags": ["ä", "b"],
    "ai_tags": [{"name": "Cat", "confidence": 98.5, "source": "google-auto-tagging"}],
    "custom_coordinates": None,
    "description": None,
    "created_at": CREATED_AT,
    "updated_at": CREATED_AT + timedelta(days=1),
}

insert_folder = Prepared(insert(folders))
insert_file = Prepared(insert(files))
insert_version = Prepared(insert(versions))
read_version = Prepared(select(versions).where(versions.c.id == bindparam("id")))


@pytest.fixture
def db(database_url: str) -> Iterator["Db"]:
    running = Running(database_url)
    yield Db(running)
    running.close()


class Db:
    """Runs transactions, each to its end."""

    def __init__(self, running: Running) -> None:
        self._running = running

    def write(self, function: Callable[[Tx], T]) -> T:
        return self._running.run(self._running.db.write(function))

    def read(self, function: Callable[[Tx], T]) -> T:
        return self._running.run(self._running.db.read(function))


def store_all(tx: Tx) -> None:
    insert_folder.run(tx, **FOLDER)
    insert_file.run(tx, **FILE)
    insert_version.run(tx, **VERSION)


def test_row_is_read_as_it_was_inserted(db: Db) -> None:
    db.write(store_all)
    version = db.read(lambda tx: read_version.one_or_none(tx, id="a"))
    assert {name: getattr(version, name) for name in VERSION} == VERSION


def test_row_is_what_sqlalchemy_itself_reads(db: Db) -> None:
    db.write(store_all)
    prepared = db.read(lambda tx: read_version.all(tx, id="a"))
    executed = db.read(lambda tx: tx.execute(select(versions)).all())
    assert [tuple(row) for row in prepared] == [tuple(row) for row in executed]


def test_no_row_is_none_or_an_empty_list(db: Db) -> None:
    assert db.read(lambda tx: read_version.one_or_none(tx, id="x")) is None
    assert db.read(lambda tx: read_version.all(tx, id="x")) == []


def test_constants_of_a_statement_stay_in_it(db: Db) -> None:
    db.write(store_all)
    images = Prepared(
        select(versions.c.id).where(versions.c.is_image == True, versions.c.mime == "image/jpeg")  # noqa: E712
    )
    assert [row.id for row in db.read(images.all)] == ["a"]


def test_statement_that_fails_raises_what_sqlalchemy_raises_and_leaves_nothing(db: Db) -> None:
    db.write(store_all)

    def store_again(tx: Tx) -> None:
        insert_folder.run(tx, **{**FOLDER, "id": "g", "path": "/b"})
        insert_file.run(tx, **FILE)

    with pytest.raises(IntegrityError):
        db.write(store_again)
    assert len(db.read(lambda tx: tx.execute(select(folders)).all())) == 1


def test_error_does_not_show_what_was_to_be_stored(db: Db) -> None:
    db.write(store_all)
    with pytest.raises(IntegrityError) as raised:
        db.write(lambda tx: insert_version.run(tx, **{**VERSION, "description": "canary"}))
    assert "canary" not in str(raised.value)
