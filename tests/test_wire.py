"""What a column is read as for responses is what its value would have been made into."""

from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from sqlalchemy import bindparam, select, type_coerce

from app.files.models import versions
from app.prepared import Prepared
from app.wire import IsoTime, ReadyJson, iso_milliseconds
from tests.test_prepared import VERSION, Db, db, insert_version, store_all

__all__ = ["db"]

read_shown = Prepared(
    select(
        type_coerce(versions.c.updated_at, IsoTime()).label("updated_at"),
        type_coerce(versions.c.tags, ReadyJson()).label("tags"),
        type_coerce(versions.c.ai_tags, ReadyJson()).label("ai_tags"),
    ).where(versions.c.id == bindparam("id"))
)


def shown(db: Db, **values: Any) -> Any:
    db.write(store_all)
    other = {"id": "b", "number": 2, "blob_key": "c"}
    db.write(lambda tx: insert_version.run(tx, **{**VERSION, **other, **values}))
    return db.read(lambda tx: read_shown.one_or_none(tx, id="b"))


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2019, 8, 24, 6, 14, 41, 999_999, UTC),
        datetime(2024, 2, 29, 23, 59, 59, 1_000, UTC),
        datetime(2026, 1, 1, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=UTC) - timedelta(microseconds=1),
    ],
    ids=str,
)
def test_moment_is_iso_cut_to_milliseconds(db: Db, moment: datetime) -> None:
    assert shown(db, updated_at=moment).updated_at == iso_milliseconds(moment)


@pytest.mark.parametrize(
    ("tags", "ai_tags"),
    [
        (['ä "quoted" \\', "日本", "\u2028"], VERSION["ai_tags"]),
        ([], []),
        (None, None),
    ],
    ids=["some", "empty", "null"],
)
def test_json_is_written_out_as_the_value_itself_would_be(db: Db, tags: Any, ai_tags: Any) -> None:
    row = shown(db, tags=tags, ai_tags=ai_tags)
    assert orjson.loads(orjson.dumps([row.tags, row.ai_tags])) == [tags, ai_tags]
    assert (row.tags is None) == (tags is None)
