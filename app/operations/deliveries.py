"""Webhook deliveries as operators and users see them, and the way to send one again."""

from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import ColumnElement, Row, select, update

from app import jobs
from app.db import Tx
from app.errors import ApiError, BadRequest
from app.ids import is_id
from app.notify import notify_due
from app.operations.runs import NO_RETRY
from app.operations.schemas import DeliveryQuery
from app.webhooks.models import DEAD, DELIVERED, attempts, deliveries
from app.wire import iso_milliseconds

REPLAY_BATCH = 500
_LISTED = tuple(column for column in deliveries.c if column.name != "body")


class DeliveryNotFound(ApiError):
    def __init__(self) -> None:
        super().__init__(404, "The requested webhook delivery does not exist.")


class InvalidDeliveryId(BadRequest):
    def __init__(self) -> None:
        super().__init__("Your request contains invalid deliveryId parameter.")


class CannotReplay(ApiError):
    def __init__(self) -> None:
        super().__init__(
            409,
            "The webhook delivery cannot be replayed: it is still pending.",
            headers=NO_RETRY,
        )


def check_delivery_id(delivery_id: str) -> None:
    if not (delivery_id.startswith("evt_") and is_id(delivery_id.removeprefix("evt_"))):
        raise InvalidDeliveryId


def list_deliveries(tx: Tx, query: DeliveryQuery) -> list[dict[str, Any]]:
    """Newest first."""
    filters = {"status": query.status, "host": query.host, "run_id": query.run_id}
    statement = select(*_LISTED).where(
        *(deliveries.c[column] == value for column, value in filters.items() if value is not None)
    )
    newest_first = statement.order_by(deliveries.c.created_at.desc(), deliveries.c.id.desc())
    rows = tx.execute(newest_first.offset(query.skip).limit(query.limit))
    return [delivery_object(row) for row in rows]


def read_delivery(tx: Tx, delivery_id: str) -> dict[str, Any]:
    """With the body and every attempt. Raises DeliveryNotFound."""
    row = tx.execute(select(deliveries).where(deliveries.c.id == delivery_id)).one_or_none()
    if row is None:
        raise DeliveryNotFound
    log = tx.execute(
        select(attempts).where(attempts.c.delivery_id == delivery_id).order_by(attempts.c.number)
    )
    return delivery_object(row) | {
        "body": orjson.loads(row.body),
        "attemptLog": [_attempt_object(attempt) for attempt in log],
    }


def replay_delivery(tx: Tx, delivery_id: str) -> dict[str, Any]:
    """Raises DeliveryNotFound, CannotReplay."""
    found = tx.execute(
        select(deliveries.c.status).where(deliveries.c.id == delivery_id).with_for_update()
    ).one_or_none()
    if found is None:
        raise DeliveryNotFound
    if found.status not in (DELIVERED, DEAD):
        raise CannotReplay
    _send_again(tx, deliveries.c.id == delivery_id)
    return read_delivery(tx, delivery_id)


def replay_dead(tx: Tx, begin: datetime, end: datetime, after: str) -> list[str]:
    """One batch of the dead ones created in a range of time, in the order of their ids.

    after: the last id of the batch before, so that one that dies again is not sent again.
    Returns the ids.
    """
    ids = list(
        tx.execute(
            select(deliveries.c.id)
            .where(
                deliveries.c.status == DEAD,
                deliveries.c.created_at >= begin,
                deliveries.c.created_at < end,
                deliveries.c.id > after,
            )
            .order_by(deliveries.c.id)
            .limit(REPLAY_BATCH)
            .with_for_update()
        ).scalars()
    )
    _send_again(tx, deliveries.c.id.in_(ids))
    return ids


def _send_again(tx: Tx, which: ColumnElement[bool]) -> None:
    """The same event and body, with 24 h of its own; attempts are counted on."""
    tx.execute(
        update(deliveries)
        .where(which)
        .values(
            jobs.unleased(
                status=jobs.PENDING, due_at=tx.now(), first_attempt_at=None, finished_at=None
            )
        )
    )
    notify_due(tx, deliveries)


def delivery_object(row: Row[Any]) -> dict[str, Any]:
    return {
        "id": row.id,
        "runId": row.run_id,
        "url": row.url,
        "status": row.status,
        "attempts": row.attempts,
        "lastError": row.last_error,
        "nextAttemptAt": iso_milliseconds(row.due_at) if row.status == jobs.PENDING else None,
        "createdAt": iso_milliseconds(row.created_at),
        "firstAttemptAt": iso_milliseconds(row.first_attempt_at) if row.first_attempt_at else None,
        "finishedAt": iso_milliseconds(row.finished_at) if row.finished_at else None,
    }


def _attempt_object(attempt: Row[Any]) -> dict[str, Any]:
    return {
        "number": attempt.number,
        "startedAt": iso_milliseconds(attempt.started_at),
        "elapsedMs": attempt.elapsed_ms,
        "statusCode": attempt.status_code,
        "error": attempt.error,
        "replyBeginning": attempt.reply_beginning.decode("utf-8", "replace"),
    }
