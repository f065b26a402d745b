"""Before and after a provider's call: the stored answer, the breaker, the monthly cap, the rate.

All of it is shared by all replicas through the database. A provider's whole answer is kept under
the bytes that were sent, so that the same picture, or other limits, cost no further call; the
call itself is claimed by inserting the answer's key with a lease.
"""

import hashlib
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from sqlalchemy import Row, and_, delete, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from app import jobs
from app.db import Tx
from app.extensions.models import answers, provider_states, usage
from app.extensions.outcomes import Failed, NotNow
from app.extensions.provider import Answer, Label, ProviderError, Reason
from app.settings import BudgetExhausted

FAILURES_TO_OPEN = 5
FIRST_COOLDOWN_SECONDS = 2.0
LONGEST_COOLDOWN_SECONDS = 30.0
# A probe that has not been heard of for so long died with its process.
PROBE_SECONDS = 30.0
HELD_RETRY_SECONDS = 1.0
_UNIT_GIVEN_BACK = frozenset({Reason.THROTTLED})


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """How one extension's provider may be called.

    provider: the name and answer version that answers are kept under. keep_seconds: 0 keeps none.
    claim_seconds: how long a call can last at most; its claim is not renewed, so that one which
    could not be ended ends by itself. monthly_calls, calls_per_second: 0 is no limit.
    """

    extension: str
    provider: str
    keep_seconds: float
    claim_seconds: float
    monthly_calls: int
    calls_per_second: float
    exhausted: BudgetExhausted

    @property
    def needs_lock(self) -> bool:
        return self.monthly_calls > 0 or self.calls_per_second > 0

    def key(self, image: bytes) -> str:
        return f"{self.provider}:{hashlib.sha256(image).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Granted:
    """The call may be made now. day: whose unit it uses. is_probe: it tries an open breaker."""

    day: date
    is_probe: bool


@dataclass(frozen=True, slots=True)
class Held:
    """Somebody else is making this very call."""


@dataclass(frozen=True, slots=True)
class TooSoon:
    """The rate allows the call after so many seconds."""

    seconds: float


Admission = Answer | Granted | Held | TooSoon | NotNow | Failed


def stored_answer(tx: Tx, key: str) -> Answer | Held | None:
    row = tx.execute(
        select(answers.c.labels, answers.c.model_version).where(
            answers.c.key == key,
            or_(answers.c.expires_at > tx.now(), answers.c.lease_until >= tx.now()),
        )
    ).one_or_none()
    if row is None:
        return None
    if row.labels is None:
        return Held()
    labels = [Label(name, confidence) for name, confidence in row.labels]
    return Answer(labels, row.model_version)


def reuse_answer(tx: Tx, policy: CallPolicy, key: str) -> Answer | Held | None:
    """The stored answer, counted as a reuse."""
    known = stored_answer(tx, key)
    if isinstance(known, Answer):
        _count(tx, policy.extension, tx.clock.wall().date(), reused=1)
    return known


def admit(tx: Tx, policy: CallPolicy, key: str, owner: str) -> Admission:
    """Whether a call may be made now; if so, it is claimed and its unit is taken."""
    if policy.keep_seconds:
        known = _known_or_held(tx, policy, key)
        if known is not None:
            return known
    state = _state(tx, policy.extension, lock=policy.needs_lock)
    if state.opened_until is not None:
        state = _state(tx, policy.extension, lock=True)
    day = tx.clock.wall().date()
    refusal = (
        _check_breaker(tx, state) or _check_cap(tx, policy, day) or _take_turn(tx, policy, state)
    )
    if refusal is not None:
        return refusal
    is_probe = state.opened_until is not None
    if is_probe:
        _set(tx, policy.extension, opened_until=tx.now(PROBE_SECONDS))
    _count(tx, policy.extension, day, calls=1)
    if policy.keep_seconds:
        _claim_answer(tx, policy, key, owner)
    return Granted(day, is_probe)


def _known_or_held(tx: Tx, policy: CallPolicy, key: str) -> Answer | Held | None:
    """Forgets an answer that has expired, and a claim whose holder died."""
    known = reuse_answer(tx, policy, key)
    if known is not None:
        return known
    now = tx.now()
    tx.execute(
        delete(answers).where(
            answers.c.key == key,
            or_(
                answers.c.expires_at <= now,
                answers.c.lease_until < now,
                and_(answers.c.labels.is_(None), answers.c.lease_until.is_(None)),
            ),
        )
    )
    return None


def _claim_answer(tx: Tx, policy: CallPolicy, key: str, owner: str) -> None:
    """On PostgreSQL a race for the key ends in a unique violation, and the loser runs again."""
    tx.execute(
        insert(answers).values(
            key=key,
            created_at=tx.clock.now(),
            lease_until=tx.now(policy.claim_seconds),
            lease_owner=owner,
        )
    )


def record_answer(tx: Tx, policy: CallPolicy, key: str, owner: str, answer: Answer) -> None:
    """The call succeeded: the answer is kept, and the breaker closes."""
    if policy.keep_seconds:
        tx.execute(
            update(answers)
            .where(answers.c.key == key, answers.c.lease_owner == owner)
            .values(
                jobs.unleased(
                    labels=[[label.name, label.confidence] for label in answer.labels],
                    model_version=answer.model_version,
                    expires_at=tx.now(policy.keep_seconds),
                )
            )
        )
    _close(tx, policy.extension)


def record_failure(
    tx: Tx, policy: CallPolicy, key: str, owner: str, granted: Granted, error: ProviderError | None
) -> None:
    """The call brought nothing: its claim ends, its unit may come back, the breaker may open.

    error: None when the call was given up before it ended. Rows are locked in the order in which
    `admit` locks them.
    """
    if error is not None:
        if error.retryable or error.reason is Reason.CREDENTIALS:
            _trip(tx, policy.extension, granted, error.reason)
        else:
            _close(tx, policy.extension)  # the provider answered, if only to refuse this picture
        if not error.was_sent or error.reason in _UNIT_GIVEN_BACK:
            _count(tx, policy.extension, granted.day, calls=-1)
    _end_claim(tx, key, owner)


def withdraw(tx: Tx, policy: CallPolicy, key: str, owner: str, granted: Granted) -> None:
    """The call will not be made: all that `admit` took is given back."""
    if granted.is_probe:
        _set(tx, policy.extension, opened_until=tx.now())
    _count(tx, policy.extension, granted.day, calls=-1)
    _end_claim(tx, key, owner)


def _end_claim(tx: Tx, key: str, owner: str) -> None:
    tx.execute(delete(answers).where(answers.c.key == key, answers.c.lease_owner == owner))


def _state(tx: Tx, extension: str, *, lock: bool) -> Row[Any]:
    statement = select(provider_states).where(provider_states.c.extension == extension)
    found = tx.execute(statement.with_for_update() if lock else statement).one_or_none()
    if found is not None:
        return found
    put = postgresql.insert if tx.is_postgres else sqlite.insert
    tx.execute(
        put(provider_states)
        .values(extension=extension, failures_in_row=0, cooldown_seconds=0.0)
        .on_conflict_do_nothing()
    )
    return tx.execute(statement.with_for_update() if lock else statement).one()


def _check_breaker(tx: Tx, state: Row[Any]) -> NotNow | Failed | None:
    """None lets the caller through: the breaker is closed, or it is time for a probe."""
    seconds = 0.0 if state.opened_until is None else _seconds_until(tx, state.opened_until)
    if seconds <= 0:
        return None
    if state.opened_for == Reason.CREDENTIALS:
        return Failed(Reason.CREDENTIALS, "The provider refuses this server's credentials.")
    reason = Reason(state.opened_for or Reason.UNAVAILABLE)
    # No longer, since the probe under way may close it; nobody claims the run before that.
    seconds = min(seconds, FIRST_COOLDOWN_SECONDS)
    return NotNow(seconds, reason, "The provider keeps failing; calls are held back for a while.")


def _trip(tx: Tx, extension: str, granted: Granted, reason: Reason) -> None:
    state = _state(tx, extension, lock=True)
    if state.opened_until is not None and not granted.is_probe:
        return
    failures = state.failures_in_row + 1
    is_open = granted.is_probe or failures >= FAILURES_TO_OPEN or reason is Reason.CREDENTIALS
    if not is_open:
        _set(tx, extension, failures_in_row=failures)
        return
    cooldown = min(
        LONGEST_COOLDOWN_SECONDS, max(FIRST_COOLDOWN_SECONDS, 2 * state.cooldown_seconds)
    )
    _set(
        tx,
        extension,
        failures_in_row=failures,
        cooldown_seconds=cooldown,
        opened_until=tx.now(cooldown),
        opened_for=reason,
    )


def _close(tx: Tx, extension: str) -> None:
    tx.execute(
        update(provider_states)
        .where(
            provider_states.c.extension == extension,
            or_(provider_states.c.failures_in_row > 0, provider_states.c.opened_until.is_not(None)),
        )
        .values(failures_in_row=0, opened_until=None, cooldown_seconds=0.0, opened_for=None)
    )


def _set(tx: Tx, extension: str, **values: Any) -> None:
    tx.execute(
        update(provider_states).where(provider_states.c.extension == extension).values(**values)
    )


def _check_cap(tx: Tx, policy: CallPolicy, day: date) -> NotNow | Failed | None:
    if not policy.monthly_calls:
        return None
    month = day.replace(day=1)
    next_month = (month + timedelta(days=32)).replace(day=1)
    used = tx.execute(
        select(func.coalesce(func.sum(usage.c.calls), 0)).where(
            usage.c.extension == policy.extension, usage.c.day >= month, usage.c.day < next_month
        )
    ).scalar_one()
    if used < policy.monthly_calls:
        return None
    _count(tx, policy.extension, day, refused=1)
    message = "This month's calls to the provider are used up."
    if policy.exhausted is BudgetExhausted.FAILED:
        return Failed(Reason.BUDGET, message)
    seconds = (
        datetime(next_month.year, next_month.month, 1, tzinfo=tx.clock.wall().tzinfo)
        - tx.clock.wall()
    ).total_seconds()
    return NotNow(seconds, Reason.BUDGET, message, extends_deadline=True)


def _take_turn(tx: Tx, policy: CallPolicy, state: Row[Any]) -> TooSoon | None:
    """One call each 1/rate seconds, over all replicas. state: its row, locked."""
    if not policy.calls_per_second:
        return None
    seconds = 0.0 if state.next_call_at is None else _seconds_until(tx, state.next_call_at)
    if seconds > 0:
        return TooSoon(seconds)
    _set(tx, policy.extension, next_call_at=tx.now(1 / policy.calls_per_second))
    return None


def _seconds_until(tx: Tx, when: datetime) -> float:
    now: datetime = tx.execute(select(tx.now())).scalar_one()
    return (when - now).total_seconds()


def _count(
    tx: Tx, extension: str, day: date, *, calls: int = 0, reused: int = 0, refused: int = 0
) -> None:
    put = postgresql.insert if tx.is_postgres else sqlite.insert
    tx.execute(
        put(usage)
        .values(extension=extension, day=day, calls=calls, reused=reused, refused=refused)
        .on_conflict_do_update(
            index_elements=[usage.c.extension, usage.c.day],
            set_={
                "calls": usage.c.calls + calls,
                "reused": usage.c.reused + reused,
                "refused": usage.c.refused + refused,
            },
        )
    )


def callable_now(tx: Tx, limits: dict[str, int]) -> dict[str, int]:
    """`limits` without the extensions whose breaker is open; one probe for each that may close.

    Bad credentials hold nothing back: runs fail at once then.
    """
    rows = tx.execute(
        select(
            provider_states.c.extension, (provider_states.c.opened_until <= tx.now()).label("probe")
        ).where(
            provider_states.c.opened_until.is_not(None),
            provider_states.c.opened_for != Reason.CREDENTIALS,
        )
    )
    open_ones = {row.extension: 1 if row.probe else 0 for row in rows}
    return {e: min(limit, open_ones.get(e, limit)) for e, limit in limits.items()}


def forget_expired_answers(tx: Tx, limit: int = 500) -> int:
    """Deletes some answers past their time. Returns how many."""
    expired = select(answers.c.key).where(answers.c.expires_at <= tx.now()).limit(limit)
    return tx.execute(delete(answers).where(answers.c.key.in_(expired))).rowcount
