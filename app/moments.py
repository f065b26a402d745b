"""Moments as responses show them: `2019-08-24T06:14:41.313Z`, cut to milliseconds."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import Dialect, TypeDecorator

from app.db import UtcDateTime

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECONDS = tuple(f"{seconds:02d}." for seconds in range(60))
_MILLISECONDS = tuple(f"{milliseconds:03d}Z" for milliseconds in range(1000))


def iso_milliseconds(when: datetime) -> str:
    """when: aware, in UTC."""
    return when.isoformat("T", "milliseconds")[: -len("+00:00")] + "Z"


class IsoTime(TypeDecorator[str]):
    """A column's moment, read as the text that responses show.

    On SQLite without a datetime on the way: to make and format one takes as long as to read a row.
    """

    impl = UtcDateTime
    cache_ok = True

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], str]:
        return iso_milliseconds if dialect.name == "postgresql" else _iso_of_microseconds


def _iso_of_microseconds(since_1970: int) -> str:
    minutes, rest = divmod(since_1970, 60_000_000)
    return _iso_minute(minutes) + _SECONDS[rest // 1_000_000] + _MILLISECONDS[rest // 1000 % 1000]


@lru_cache(maxsize=4096)
def _iso_minute(since_1970: int) -> str:
    """`2019-08-24T06:14:`"""
    return (_EPOCH + timedelta(minutes=since_1970)).isoformat()[: len("2019-08-24T06:14:")]
