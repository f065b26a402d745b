"""Transactions on extension runs: born, claimed, finished. The rules of retrying live here."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Row, bindparam, func, insert, select, update

from app import jobs
from app.db import Tx, now_plus
from app.extensions.calls import CallPolicy, callable_now, calls_left
from app.extensions.models import FAILED, SUCCESS, runs
from app.extensions.outcomes import Failed, NotNow, Outcome, Succeeded, TryAgain
from app.extensions.provider import Reason
from app.extensions.schemas import AutoTagging
from app.ids import new_id
from app.notify import notify_due
from app.prepared import Prepared, given

DEADLINE_SECONDS = 24 * 3600
MAX_GARBLED_REPLIES = 3


_start_run = Prepared(
    insert(runs)
    .values(
        **given(
            runs,
            "id",
            "file_id",
            "version_id",
            "extension",
            "number",
            "min_confidence",
            "max_tags",
            "webhook_url",
            "request_id",
            "created_at",
        ),
        announced=False,
        status=jobs.PENDING,
        attempts=1,
        garbled_replies=0,
        due_at=now_plus(),
        expires_at=now_plus(DEADLINE_SECONDS),
        **jobs.lease(),
    )
    .returning(*runs.c)
)


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
        _start_run.one_or_none(
            tx,
            id=new_id(),
            file_id=file_id,
            version_id=version_id,
            extension=extension.name,
            number=numbers.get(extension.name, 0) + 1,
            min_confidence=extension.min_confidence,
            max_tags=extension.max_tags,
            webhook_url=webhook_url,
            request_id=request_id,
            created_at=created_at,
            owner=owner,
            lease_seconds=jobs.LEASE_SECONDS,
        )
        for extension in wanted
    ]


_latest_numbers = Prepared(
    select(runs.c.extension, func.max(runs.c.number).label("number"))
    .where(runs.c.version_id == bindparam("version_id"))
    .group_by(runs.c.extension)
)


def latest_numbers(tx: Tx, version_id: str) -> dict[str, int]:
    """extension -> number of its latest run on this version."""
    return {run.extension: run.number for run in _latest_numbers.all(tx, version_id=version_id)}


_claim_runs = jobs.claiming(runs, runs.c.extension == bindparam("extension"), announced=True)


def claim_runs(tx: Tx, owner: str, limits: dict[str, int], background_slots: int) -> list[Row[Any]]:
    """Due runs, at most so many of each extension. Taken over, so their end gets a webhook.

    background_slots: how many calls of an extension the background makes at once, over all
    replicas.
    """
    return [
        row
        for extension, limit in callable_now(tx, limits, background_slots).items()
        if limit > 0
        for row in jobs.claim(tx, _claim_runs, owner, limit, extension=extension)
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
    if isinstance(outcome, TryAgain | NotNow):
        outcome = _put_off(tx, run_id, attempt, outcome)
    if isinstance(outcome, TryAgain | NotNow):
        return None
    return _end(tx, run_id, attempt, outcome)


def _put_off(tx: Tx, run_id: str, attempt: int, outcome: TryAgain | NotNow) -> Outcome:
    """Leaves the run pending, if it may wait; how it ends, if it may not."""
    run = tx.execute(
        select(runs).where(jobs.is_held(runs, run_id, attempt)).with_for_update()
    ).one_or_none()
    if run is None:
        return outcome
    if isinstance(outcome, NotNow):
        return _wait(tx, run, outcome)
    return _give_up_or_retry(tx, run, outcome)


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


_end_run = Prepared(
    update(runs)
    .where(jobs.is_held(runs, bindparam("run_id"), bindparam("attempt")))
    .values(
        jobs.unleased(
            **given(runs, "status", "reason", "last_error", "provider", "elapsed_ms", "finished_at")
        )
    )
    .returning(*runs.c)
)


def _end(tx: Tx, run_id: str, attempt: int, outcome: Succeeded | Failed) -> Row[Any] | None:
    """The run, now final; None if this attempt is no longer the one that counts."""
    failure = outcome if isinstance(outcome, Failed) else None
    run: Row[Any] | None = _end_run.one_or_none(
        tx,
        run_id=run_id,
        attempt=attempt,
        status=FAILED if failure else SUCCESS,
        reason=failure.reason if failure else None,
        last_error=failure.message if failure else None,
        provider=outcome.provider,
        elapsed_ms=outcome.elapsed_ms,
        finished_at=tx.clock.now(),
    )
    return run


_lock_pending = Prepared(
    select(runs.c.id, runs.c.attempts)
    .where(runs.c.version_id == bindparam("version_id"), runs.c.status == jobs.PENDING)
    .with_for_update()
)


def end_pending_runs(tx: Tx, version_id: str, outcome: Failed) -> list[Row[Any]]:
    """Ends what still runs on a version that is going away. Returns the runs ended."""
    ended = (
        _end(tx, run.id, run.attempts, outcome)
        for run in _lock_pending.all(tx, version_id=version_id)
    )
    return [run for run in ended if run is not None]


_lock_run = Prepared(
    select(runs.c.id, runs.c.extension, runs.c.status)
    .where(runs.c.id == bindparam("run_id"))
    .with_for_update()
)
_announce = Prepared(update(runs).where(runs.c.id == bindparam("run_id")).values(announced=True))
_give_back = Prepared(
    update(runs).where(runs.c.id == bindparam("run_id")).values(jobs.unleased(due_at=now_plus()))
)


def announce(tx: Tx, run_ids: Sequence[str], given_back: Sequence[str]) -> dict[str, str]:
    """The status of each run by extension, as the response will say; those pending are marked.

    given_back: runs whose call has not begun: anyone may take them now.
    """
    locked = [_lock_run.one_or_none(tx, run_id=run_id) for run_id in run_ids]
    for run in locked:
        if run.status == jobs.PENDING:
            _announce.run(tx, run_id=run.id)
            if run.id in given_back:
                _give_back.run(tx, run_id=run.id)
    if given_back:
        notify_due(tx, runs)
    return {run.extension: run.status for run in locked}


def announce_pending(tx: Tx, version_id: str) -> None:
    """Marks what still runs on a version: a response calls it pending."""
    tx.execute(
        update(runs)
        .where(runs.c.version_id == version_id, runs.c.status == jobs.PENDING)
        .values(announced=True)
    )


_newer_success = Prepared(
    select(runs.c.id)
    .where(
        runs.c.version_id == bindparam("version_id"),
        runs.c.extension == bindparam("extension"),
        runs.c.number > bindparam("number"),
        runs.c.status == SUCCESS,
    )
    .limit(1)
)


def is_superseded(tx: Tx, run: Row[Any]) -> bool:
    """True if a newer run's tags stand on the version already."""
    newer = _newer_success.one_or_none(
        tx, version_id=run.version_id, extension=run.extension, number=run.number
    )
    return newer is not None


_read_statuses = Prepared(
    select(runs.c.extension, runs.c.status)
    .where(runs.c.version_id == bindparam("version_id"))
    .order_by(runs.c.number)
)


def latest_statuses(tx: Tx, version_id: str) -> dict[str, str]:
    """extension -> status of its latest run on this version."""
    return {run.extension: run.status for run in _read_statuses.all(tx, version_id=version_id)}
