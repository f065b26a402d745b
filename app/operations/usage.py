"""What the account has used. Source: the contract's section 4.10, messages included."""

import re
from datetime import date
from typing import Any

from sqlalchemy import func, select

from app.db import Tx
from app.errors import BadRequest
from app.extensions.models import usage
from app.extensions.schemas import AWS, GOOGLE
from app.files.models import versions

LONGEST_SPAN_DAYS = 90
# Extension units of one call.
UNITS = {GOOGLE: 2, AWS: 1}
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def parse_days(start: str | None, end: str | None) -> tuple[date, date]:
    """The first day and the day after the last one. Raises BadRequest."""
    if not start or not end:
        raise BadRequest("startDate and endDate are required in query parameters.")
    first, after_last = _parse_day(start), _parse_day(end)
    if first >= after_last:
        raise BadRequest("startDate should be before endDate.")
    if (after_last - first).days >= LONGEST_SPAN_DAYS:
        raise BadRequest("startDate and endDate should be within 90 days.")
    return first, after_last


def _parse_day(text: str) -> date:
    try:
        if _DAY.fullmatch(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise BadRequest("startDate and endDate should be in format YYYY-MM-DD.")


def account_usage(tx: Tx, first: date, after_last: date) -> dict[str, Any]:
    extensions = _by_extension(tx, first, after_last)
    stored = tx.execute(select(func.coalesce(func.sum(versions.c.size_bytes), 0))).scalar_one()
    return {
        "bandwidthBytes": 0,
        "mediaLibraryStorageBytes": int(stored),
        "videoProcessingUnitsCount": 0,
        "extensionUnitsCount": sum(extensions[name]["calls"] * UNITS[name] for name in UNITS),
        "originalCacheStorageBytes": 0,
        "extensions": extensions,
    }


def _by_extension(tx: Tx, first: date, after_last: date) -> dict[str, dict[str, int]]:
    counted = {
        "calls": usage.c.calls,
        "reusedAnswers": usage.c.reused,
        "refusedCalls": usage.c.refused,
    }
    rows = tx.execute(
        select(usage.c.extension, *(func.sum(column) for column in counted.values()))
        .where(usage.c.day >= first, usage.c.day < after_last)
        .group_by(usage.c.extension)
    )
    sums = {row[0]: dict(zip(counted, map(int, row[1:]), strict=True)) for row in rows}
    return {name: sums.get(name, dict.fromkeys(counted, 0)) for name in UNITS}
