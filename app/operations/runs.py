"""Extension runs as operators and users see them, and the way to try one again."""

from typing import Any

from sqlalchemy import Row, insert, select

from app import jobs
from app.db import Tx
from app.errors import ApiError, BadRequest
from app.extensions.models import runs
from app.extensions.runs import DEADLINE_SECONDS, latest_numbers
from app.files.models import files
from app.ids import is_id, new_id
from app.notify import notify_due
from app.operations.schemas import RunQuery
from app.wire import iso_milliseconds

# Clients of this API retry a 409 by themselves unless they are told not to.
NO_RETRY = {"x-should-retry": "false"}


class RunNotFound(ApiError):
    def __init__(self) -> None:
        super().__init__(404, "The requested extension run does not exist.")


class InvalidRunId(BadRequest):
    def __init__(self) -> None:
        super().__init__("Your request contains invalid runId parameter.")


class CannotRetry(ApiError):
    def __init__(self, why: str) -> None:
        super().__init__(409, f"The extension run cannot be retried: {why}", headers=NO_RETRY)


def check_run_id(run_id: str) -> None:
    if not is_id(run_id):
        raise InvalidRunId


def list_runs(tx: Tx, query: RunQuery) -> list[dict[str, Any]]:
    """Newest first."""
    filters = {"status": query.status, "extension": query.extension, "file_id": query.file_id}
    statement = select(runs).where(
        *(runs.c[column] == value for column, value in filters.items() if value is not None)
    )
    newest_first = statement.order_by(runs.c.created_at.desc(), runs.c.id.desc())
    return [
        run_object(row) for row in tx.execute(newest_first.offset(query.skip).limit(query.limit))
    ]


def read_run(tx: Tx, run_id: str) -> dict[str, Any]:
    return run_object(_run(tx, run_id))


def _run(tx: Tx, run_id: str) -> Row[Any]:
    """Raises RunNotFound."""
    run = tx.execute(select(runs).where(runs.c.id == run_id)).one_or_none()
    if run is None:
        raise RunNotFound
    return run


def retry_run(tx: Tx, run_id: str, request_id: str) -> dict[str, Any]:
    """A new run with the old one's limits and webhook, for anyone to take. Raises CannotRetry.

    It is announced from the start, since no response can tell how it ends.
    """
    file_id = _run(tx, run_id).file_id
    file = tx.execute(
        select(files.c.current_version_id).where(files.c.id == file_id).with_for_update()
    ).one_or_none()
    run = _run(tx, run_id)  # as it is now that nothing can begin or end on its file
    if run.status == jobs.PENDING:
        raise CannotRetry("it is still pending.")
    if file is None:
        raise CannotRetry("its file has been deleted.")
    if file.current_version_id != run.version_id:
        raise CannotRetry("a newer version has replaced its file.")
    copied = ("file_id", "version_id", "extension", "min_confidence", "max_tags", "webhook_url")
    again = tx.execute(
        insert(runs)
        .values(
            id=new_id(),
            number=latest_numbers(tx, run.version_id)[run.extension] + 1,
            announced=True,
            status=jobs.PENDING,
            attempts=0,
            garbled_replies=0,
            due_at=tx.now(),
            request_id=request_id,
            created_at=tx.clock.now(),
            expires_at=tx.now(DEADLINE_SECONDS),
            **{column: getattr(run, column) for column in copied},
        )
        .returning(*runs.c)
    ).one()
    notify_due(tx, runs)
    return run_object(again)


def run_object(run: Row[Any]) -> dict[str, Any]:
    return {
        "id": run.id,
        "fileId": run.file_id,
        "versionId": run.version_id,
        "extension": run.extension,
        "number": run.number,
        "status": run.status,
        "reason": run.reason,
        "attempts": run.attempts,
        "lastError": run.last_error,
        "nextAttemptAt": iso_milliseconds(run.due_at) if run.status == jobs.PENDING else None,
        "provider": run.provider,
        "elapsedMs": run.elapsed_ms,
        "minConfidence": run.min_confidence,
        "maxTags": run.max_tags,
        "webhookUrl": run.webhook_url,
        "announced": run.announced,
        "requestId": run.request_id,
        "createdAt": iso_milliseconds(run.created_at),
        "finishedAt": iso_milliseconds(run.finished_at) if run.finished_at else None,
        "deadline": iso_milliseconds(run.expires_at),
    }
