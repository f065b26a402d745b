"""Transactions on extension runs: born, claimed, finished. The rules of retrying live here."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, Select, bindparam, func, insert, select, update

from app import jobs
from app.db import Tx
from app.extensions.calls import CallPolicy, callable_now, calls_left
from app.extensions.models import FAILED, SUCCESS, runs
from app.extensions.outcomes import Failed, NotNow, Outcome, Succeeded, TryAgain
from app.extensions.provider import Reason
from app.extensions.schemas import AutoTagging
from app.ids import new_id
from app.notify import notify_due
from app.prepared import Prepared

DEADLINE_SECONDS = 24 * 3600
MAX_GARBLED_REPLIES = 3


def start_runs(
    tx: Tx,
    wanted: Sequence[AutoTagging],
    *,
    file_id: str,
    version_id: str,
    webhook_url: str | None,
    owner: str,
    request_id: str,
) -> Sequence[Row[Any]]:
    """One pending run for each extension, leased to `owner` and numbered.

    The caller holds the version's row, so that no other request numbers runs meanwhile.
    """
    if not wanted:
        return []
    numbers = latest_numbers(tx, version_id)
    created_at = tx.clock.now()
    return [
        tx.execute(
            insert(runs)
            .values(
                id=new_id(),
                file_id=file_id,
                version_id=version_id,
                extension=extension.name,
                number=numbers.get(extension.name, 0) + 1,
                min_confidence=extension.min_confidence,
                max_tags=extension.max_tags,
                webhook_url=webhook_url,
                announced=False,
                status=jobs.PENDING,
                attempts=1,
                garbled_replies=0,
                due_at=tx.now(),
                request_id=request_id,
                created_at=created_at,
                expires_at=tx.now(DEADLINE_SECONDS),
                **jobs.lease(tx, owner),
            )
            .returning(*runs.c)
        ).one()
        for extension in wanted
    ]


def latest_numbers(tx: Tx, version_id: str) -> dict[str, int]:
    """extension -> number of its latest run on this version."""
    latest = select(runs.c.extension, func.max(runs.c.number)).where(
        runs.c.version_id == version_id
    )
    return _by_extension(tx, latest.group_by(runs.c.extension))


def claim_runs(tx: Tx, owner: str, limits: dict[str, int], background_slots: int) -> list[Row[Any]]:
    """Due runs, at most so many of each extension. Taken over, so their end gets a webhook.

    background_slots: how many calls of an extension the background makes at once, over all
    replicas.
    """
    return [
        row
        for extension, limit in callable_now(tx, limits, background_slots).items()
        if limit > 0
        for row in jobs.claim(tx, runs, owner, limit, runs.c.extension == extension, announced=True)
    ]


def resume_runs(tx: Tx, policy: CallPolicy) -> None:
    """Makes runs due that wait for the next month, as far as the cap allows calls by now.

    The oldest first. Their deadline comes nearer by what they need not wait any longer.
    """
    most = calls_left(tx, policy, tx.clock.wall().date()) if policy.monthly_calls else None
    if most is not None and most <= 0:
        return
    waiting = (
        select(runs.c.id)
        .where(
            runs.c.status == jobs.PENDING,
            runs.c.extension == policy.extension,
            runs.c.reason == Reason.BUDGET,
            runs.c.lease_until.is_(None),
            runs.c.due_at > tx.now(),
        )
        .order_by(runs.c.created_at)
        .limit(most)
        .with_for_update(skip_locked=True)
        .cte("waiting")
    )
    tx.execute(
        update(runs)
        .where(runs.c.id.in_(select(waiting.c.id)))
        .values(due_at=tx.now(), expires_at=runs.c.expires_at - (runs.c.due_at - tx.now()))
    )


def finish_run(tx: Tx, run_id: str, attempt: int, outcome: Outcome) -> Row[Any] | None:
    """Records how an attempt ended; a TryAgain past its deadline or patience becomes a failure.

    Returns the run if it is now final; None if it stays pending, or if this attempt is no longer
    the one that counts.
    """
    run = tx.execute(
        select(runs).where(jobs.is_held(runs, run_id, attempt)).with_for_update()
    ).one_or_none()
    if run is None:
        return None
    if isinstance(outcome, NotNow):
        outcome = _wait(tx, run, outcome)
    elif isinstance(outcome, TryAgain):
        outcome = _give_up_or_retry(tx, run, outcome)
    if isinstance(outcome, TryAgain | NotNow):
        return None
    return _end(tx, run.id, outcome)


def _wait(tx: Tx, run: Row[Any], outcome: NotNow) -> Outcome:
    """Puts the run off as if it had not been taken: no call was made."""
    due_at, expires_at = _due_and_deadline(tx, run.id, outcome.seconds)
    if outcome.extends_deadline:
        expires_at += timedelta(seconds=outcome.seconds)
    elif due_at > expires_at:
        return Failed(outcome.reason, outcome.message, outcome.provider, outcome.elapsed_ms)
    tx.execute(
        update(runs)
        .where(runs.c.id == run.id)
        .values(
            jobs.unleased(
                due_at=due_at,
                expires_at=expires_at,
                attempts=run.attempts - 1,
                reason=outcome.reason,
                last_error=outcome.message,
            )
        )
    )
    return outcome


def _due_and_deadline(tx: Tx, run_id: str, delay_seconds: float) -> tuple[datetime, datetime]:
    row = tx.execute(
        select(tx.now(delay_seconds), runs.c.expires_at).where(runs.c.id == run_id)
    ).one()
    return row[0], row[1]


def _give_up_or_retry(tx: Tx, run: Row[Any], outcome: TryAgain) -> Outcome:
    garbled = run.garbled_replies + 1 if outcome.reason is Reason.BAD_REPLY else 0
    # What a vendor asks for can be any number.
    asked_seconds = min(outcome.retry_after_seconds or 0, DEADLINE_SECONDS)
    delay = max(jobs.backoff_seconds(run.attempts), asked_seconds)
    now, due_at = tx.execute(select(tx.now(), tx.now(delay))).one()
    if garbled >= MAX_GARBLED_REPLIES or now >= run.expires_at:
        return Failed(outcome.reason, outcome.message, outcome.provider, outcome.elapsed_ms)
    tx.execute(
        update(runs)
        .where(runs.c.id == run.id)
        .values(
            jobs.unleased(
                due_at=min(due_at, run.expires_at),
                reason=outcome.reason,
                last_error=outcome.message,
                garbled_replies=garbled,
                provider=outcome.provider,
                elapsed_ms=outcome.elapsed_ms,
            )
        )
    )
    return outcome


def _end(tx: Tx, run_id: str, outcome: Succeeded | Failed) -> Row[Any]:
    failure = outcome if isinstance(outcome, Failed) else None
    return tx.execute(
        update(runs)
        .where(runs.c.id == run_id)
        .values(
            jobs.unleased(
                status=FAILED if failure else SUCCESS,
                reason=failure.reason if failure else None,
                last_error=failure.message if failure else None,
                provider=outcome.provider,
                elapsed_ms=outcome.elapsed_ms,
                finished_at=tx.clock.now(),
            )
        )
        .returning(*runs.c)
    ).one()


def end_pending_runs(tx: Tx, version_id: str, outcome: Failed) -> list[Row[Any]]:
    """Ends what still runs on a version that is going away. Returns the runs ended."""
    pending = tx.execute(
        select(runs.c.id)
        .where(runs.c.version_id == version_id, runs.c.status == jobs.PENDING)
        .with_for_update()
    ).scalars()
    return [_end(tx, run_id, outcome) for run_id in pending.all()]


def announce(tx: Tx, run_ids: Sequence[str], given_back: Sequence[str]) -> dict[str, str]:
    """The status of each run by extension, as the response will say; those pending are marked.

    given_back: runs whose call has not begun: anyone may take them now.
    """
    still_pending = [runs.c.id.in_(run_ids), runs.c.status == jobs.PENDING]
    tx.execute(update(runs).where(*still_pending).values(announced=True))
    if given_back:
        tx.execute(
            update(runs)
            .where(runs.c.id.in_(given_back), runs.c.status == jobs.PENDING)
            .values(jobs.unleased(due_at=tx.now()))
        )
        notify_due(tx, runs)
    return _by_extension(tx, select(runs.c.extension, runs.c.status).where(runs.c.id.in_(run_ids)))


def announce_pending(tx: Tx, version_id: str) -> None:
    """Marks what still runs on a version: a response calls it pending."""
    tx.execute(
        update(runs)
        .where(runs.c.version_id == version_id, runs.c.status == jobs.PENDING)
        .values(announced=True)
    )


def is_superseded(tx: Tx, run: Row[Any]) -> bool:
    """True if a newer run's tags stand on the version already."""
    newer = select(runs.c.id).where(
        runs.c.version_id == run.version_id,
        runs.c.extension == run.extension,
        runs.c.number > run.number,
        runs.c.status == SUCCESS,
    )
    return tx.execute(newer.limit(1)).first() is not None


_read_statuses = Prepared(
    select(runs.c.extension, runs.c.status)
    .where(runs.c.version_id == bindparam("version_id"))
    .order_by(runs.c.number)
)


def latest_statuses(tx: Tx, version_id: str) -> dict[str, str]:
    """extension -> status of its latest run on this version."""
    return {run.extension: run.status for run in _read_statuses.all(tx, version_id=version_id)}


def _by_extension(tx: Tx, statement: Select[Any]) -> dict[str, Any]:
    """A statement of two columns, the first the extension, as a mapping; the last row wins."""
    return {row[0]: row[1] for row in tx.execute(statement)}
