"""Columns that are read as responses show them, without what lies between: a list has hundreds."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

import orjson
from sqlalchemy import Dialect, TypeDecorator

from app.db import UtcDateTime, json_column

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECONDS = tuple(f"{seconds:02d}." for seconds in range(60))
_MILLISECONDS = tuple(f"{milliseconds:03d}Z" for milliseconds in range(1000))


class IsoTime(TypeDecorator[str]):
    """A moment as `2019-08-24T06:14:41.313Z`, cut to milliseconds."""

    impl = UtcDateTime
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], str]:
        return iso_milliseconds if dialect.name == "postgresql" else _iso_of_microseconds


def iso_milliseconds(when: datetime) -> str:
    """when: aware, in UTC."""
    return when.isoformat("T", "milliseconds")[: -len("+00:00")] + "Z"


def _iso_of_microseconds(since_1970: int) -> str:
    minutes, rest = divmod(since_1970, 60_000_000)
    return _iso_minute(minutes) + _SECONDS[rest // 1_000_000] + _MILLISECONDS[rest // 1000 % 1000]


@lru_cache(maxsize=4096)
def _iso_minute(since_1970: int) -> str:
    """`2019-08-24T06:14:`"""
    return (_EPOCH + timedelta(minutes=since_1970)).isoformat()[: len("2019-08-24T06:14:")]


class ReadyJson(TypeDecorator[Any]):
    """JSON for orjson to write out: the text itself where that is what the database keeps."""

    impl = json_column()
    cache_ok = True

    def result_processor(
        self, dialect: Dialect, coltype: object
    ) -> Callable[[Any], orjson.Fragment | None] | None:
        return None if dialect.name == "postgresql" else _fragment


def _fragment(text: str | None) -> orjson.Fragment | None:
    return None if text is None else orjson.Fragment(text)
