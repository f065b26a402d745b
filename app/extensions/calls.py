"""Before and after a provider's call: the stored answer, breaker, monthly cap, rate and slot.

All of it is shared by all replicas through the database. A provider's whole answer is kept under
the bytes that were sent, so that the same picture, or other limits, cost no further call; the
call itself is claimed by inserting the answer's key with a lease.
"""

import hashlib
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Row,
    and_,
    bindparam,
    delete,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from app import jobs
from app.db import Tx, now_plus
from app.extensions.models import answers, provider_states, slots, usage
from app.extensions.outcomes import Failed, NotNow
from app.extensions.provider import Answer, CallLimits, Label, ProviderError, Reason
from app.prepared import Prepared, given
from app.settings import BudgetExhausted

FAILURES_TO_OPEN = 5
FIRST_COOLDOWN_SECONDS = 2.0
LONGEST_COOLDOWN_SECONDS = 30.0
# A probe that has not been heard of for so long died with its process.
PROBE_SECONDS = 30.0
# A call ends at its deadline; the record of it takes no longer than this.
RECORD_SECONDS = 5.0
_UNIT_GIVEN_BACK = frozenset({Reason.THROTTLED})


@dataclass(frozen=True, slots=True)
class CallPolicy:
    """How one extension's provider may be called.

    provider: the name and answer version that answers are kept under. keep_seconds: 0 keeps none.
    monthly_calls, calls_per_second: 0 is no limit.
    """

    extension: str
    provider: str
    keep_seconds: float
    limits: CallLimits
    monthly_calls: int
    calls_per_second: float
    exhausted: BudgetExhausted

    @property
    def claim_seconds(self) -> float:
        """How long a call can last at most.

        Its claim is not renewed, so that one which could not be ended ends by itself.
        """
        return self.limits.timeout_seconds + RECORD_SECONDS

    @property
    def needs_lock(self) -> bool:
        return self.monthly_calls > 0 or self.calls_per_second > 0

    def key(self, image: bytes) -> str:
        return f"{self.provider}:{hashlib.sha256(image).hexdigest()}"


@dataclass(frozen=True, slots=True)
class Slot:
    """lease_until: tells the call that has it from a later one."""

    number: int
    lease_until: datetime


@dataclass(frozen=True, slots=True)
class Granted:
    """The call may be made now, and what it took for that.

    key, owner: its claim. day: whose unit it uses. is_probe: it tries an open breaker. slot: None
    on SQLite, where the one process counts its calls itself.
    """

    key: str
    owner: str
    day: date
    is_probe: bool
    slot: Slot | None


@dataclass(frozen=True, slots=True)
class Held:
    """Somebody else is making this very call."""


@dataclass(frozen=True, slots=True)
class TooSoon:
    """The rate allows the call after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class NoSlot:
    """As many calls as may be are in flight."""


Admission = Answer | Granted | Held | TooSoon | NoSlot | NotNow | Failed


def make_slots(tx: Tx, policy: CallPolicy) -> None:
    """Those that are missing. Where replicas disagree, each takes slots up to its own number."""
    if not tx.is_postgres:
        return
    numbers = range(policy.limits.concurrency)
    tx.execute(
        postgresql.insert(slots)
        .values([{"extension": policy.extension, "number": number} for number in numbers])
        .on_conflict_do_nothing()
    )


_find_answer = Prepared(
    select(answers.c.labels, answers.c.model_version).where(
        answers.c.key == bindparam("key"),
        or_(answers.c.expires_at > now_plus(), answers.c.lease_until >= now_plus()),
    )
)


def stored_answer(tx: Tx, key: str) -> Answer | Held | None:
    row = _find_answer.one_or_none(tx, key=key)
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


def admit(
    tx: Tx, policy: CallPolicy, key: str, owner: str, *, in_background: bool = False
) -> Admission:
    """Whether a call may be made now; if so, it is claimed, and its slot and unit are taken."""
    if policy.keep_seconds:
        known = _known_or_held(tx, policy, key)
        if known is not None:
            return known
    state = _state(tx, policy.extension, lock=policy.needs_lock)
    if state.opened_until is not None:
        state = _state(tx, policy.extension, lock=True)
    day = tx.clock.wall().date()
    refusal = (
        _check_breaker(tx, state) or _check_cap(tx, policy, day) or _check_rate(tx, policy, state)
    )
    if refusal is not None:
        return refusal
    slot = _take_slot(tx, policy, owner, in_background) if tx.is_postgres else None
    if slot is None and tx.is_postgres:
        return NoSlot()
    granted = Granted(key, owner, day, state.opened_until is not None, slot)
    _take(tx, policy, granted)
    return granted


def _take(tx: Tx, policy: CallPolicy, granted: Granted) -> None:
    """The probe, the turn, the unit and the claim."""
    if granted.is_probe:
        _set(tx, policy.extension, opened_until=tx.now(PROBE_SECONDS))
    if policy.calls_per_second:
        _set(tx, policy.extension, next_call_at=tx.now(1 / policy.calls_per_second))
    _count(tx, policy.extension, granted.day, calls=1)
    if policy.keep_seconds:
        _claim_answer(tx, policy, granted)


_forget_answer = Prepared(
    delete(answers).where(
        answers.c.key == bindparam("key"),
        or_(
            answers.c.expires_at <= now_plus(),
            answers.c.lease_until < now_plus(),
            and_(answers.c.labels.is_(None), answers.c.lease_until.is_(None)),
        ),
    )
)


def _known_or_held(tx: Tx, policy: CallPolicy, key: str) -> Answer | Held | None:
    """Forgets an answer that has expired, and a claim whose holder died."""
    known = reuse_answer(tx, policy, key)
    if known is not None:
        return known
    _forget_answer.run(tx, key=key)
    return None


_insert_claim = Prepared(
    insert(answers).values(
        **given(answers, "key", "created_at", "lease_owner"),
        lease_until=now_plus(bindparam("claim_seconds")),
    )
)


def _claim_answer(tx: Tx, policy: CallPolicy, granted: Granted) -> None:
    """On PostgreSQL a race for the key ends in a unique violation, and the loser runs again."""
    _insert_claim.run(
        tx,
        key=granted.key,
        created_at=tx.clock.now(),
        lease_owner=granted.owner,
        claim_seconds=policy.claim_seconds,
    )


def _is_free() -> ColumnElement[bool]:
    """A call that died holds its slot for as long as it could have lasted."""
    now = select(now_plus()).scalar_subquery()
    return or_(slots.c.lease_until.is_(None), slots.c.lease_until < now)


_highest_free_slot = (
    select(slots.c.number)
    .where(
        slots.c.extension == bindparam("extension"),
        slots.c.number < bindparam("end"),
        _is_free(),
    )
    .order_by(slots.c.number.desc())
    .limit(1)
    .with_for_update(skip_locked=True)
    .cte("free")
)
_lease_slot = Prepared(
    update(slots)
    .where(
        slots.c.extension == bindparam("extension"),
        slots.c.number.in_(select(_highest_free_slot.c.number)),
    )
    .values(lease_until=now_plus(bindparam("claim_seconds")), lease_owner=bindparam("owner"))
    .returning(slots.c.number, slots.c.lease_until)
)


def _take_slot(tx: Tx, policy: CallPolicy, owner: str, in_background: bool) -> Slot | None:
    """A request takes the highest that is free, so that those below the half are its last."""
    limits = policy.limits
    taken = _lease_slot.one_or_none(
        tx,
        extension=policy.extension,
        end=limits.background_slots if in_background else limits.concurrency,
        claim_seconds=policy.claim_seconds,
        owner=owner,
    )
    return None if taken is None else Slot(taken.number, taken.lease_until)


_unlease_slot = Prepared(
    update(slots)
    .where(
        slots.c.extension == bindparam("extension"),
        slots.c.number == bindparam("number"),
        slots.c.lease_owner == bindparam("owner"),
        slots.c.lease_until == bindparam("until"),
    )
    .values(jobs.unleased())
)


def _free_slot(tx: Tx, policy: CallPolicy, granted: Granted) -> None:
    if granted.slot is None:
        return
    _unlease_slot.run(
        tx,
        extension=policy.extension,
        number=granted.slot.number,
        owner=granted.owner,
        until=granted.slot.lease_until,
    )


_keep_answer = Prepared(
    update(answers)
    .where(answers.c.key == bindparam("claimed"), answers.c.lease_owner == bindparam("owner"))
    .values(
        jobs.unleased(
            **given(answers, "labels", "model_version"),
            expires_at=now_plus(bindparam("keep_seconds")),
        )
    )
)


def record_answer(tx: Tx, policy: CallPolicy, granted: Granted, answer: Answer) -> None:
    """The call succeeded: the answer is kept, and the breaker closes."""
    if policy.keep_seconds:
        _keep_answer.run(
            tx,
            claimed=granted.key,
            owner=granted.owner,
            labels=[[label.name, label.confidence] for label in answer.labels],
            model_version=answer.model_version,
            keep_seconds=policy.keep_seconds,
        )
    _close(tx, policy.extension)
    _free_slot(tx, policy, granted)


def record_failure(
    tx: Tx, policy: CallPolicy, granted: Granted, error: ProviderError | None
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
    _end_claim(tx, policy, granted)


def withdraw(tx: Tx, policy: CallPolicy, granted: Granted) -> None:
    """The call will not be made: all that `admit` took is given back."""
    if granted.is_probe:
        _set(tx, policy.extension, opened_until=tx.now())
    _count(tx, policy.extension, granted.day, calls=-1)
    _end_claim(tx, policy, granted)


def _end_claim(tx: Tx, policy: CallPolicy, granted: Granted) -> None:
    tx.execute(
        delete(answers).where(answers.c.key == granted.key, answers.c.lease_owner == granted.owner)
    )
    _free_slot(tx, policy, granted)


_select_state = select(provider_states).where(provider_states.c.extension == bindparam("extension"))
_read_state = Prepared(_select_state)
_lock_state = Prepared(_select_state.with_for_update())


def _state(tx: Tx, extension: str, *, lock: bool) -> Any:
    statement = _lock_state if lock else _read_state
    found = statement.one_or_none(tx, extension=extension)
    if found is not None:
        return found
    put = postgresql.insert if tx.is_postgres else sqlite.insert
    tx.execute(
        put(provider_states)
        .values(extension=extension, failures_in_row=0, cooldown_seconds=0.0)
        .on_conflict_do_nothing()
    )
    return statement.one_or_none(tx, extension=extension)


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


_close_breaker = Prepared(
    update(provider_states)
    .where(
        provider_states.c.extension == bindparam("closed"),
        or_(provider_states.c.failures_in_row > 0, provider_states.c.opened_until.is_not(None)),
    )
    .values(failures_in_row=0, opened_until=None, cooldown_seconds=0.0, opened_for=None)
)


def _close(tx: Tx, extension: str) -> None:
    _close_breaker.run(tx, closed=extension)


def _set(tx: Tx, extension: str, **values: Any) -> None:
    tx.execute(
        update(provider_states).where(provider_states.c.extension == extension).values(**values)
    )


def _check_cap(tx: Tx, policy: CallPolicy, day: date) -> NotNow | Failed | None:
    if not policy.monthly_calls:
        return None
    if calls_left(tx, policy, day) > 0:
        return None
    _count(tx, policy.extension, day, refused=1)
    message = "This month's calls to the provider are used up."
    if policy.exhausted is BudgetExhausted.FAILED:
        return Failed(Reason.BUDGET, message)
    month = datetime.combine(_next_month(day), time(), tzinfo=UTC)
    seconds = (month - tx.clock.wall()).total_seconds()
    return NotNow(seconds, Reason.BUDGET, message, extends_deadline=True)


def calls_left(tx: Tx, policy: CallPolicy, day: date) -> int:
    """Of the cap, in this day's month."""
    used: int = tx.execute(
        select(func.coalesce(func.sum(usage.c.calls), 0)).where(
            usage.c.extension == policy.extension,
            usage.c.day >= day.replace(day=1),
            usage.c.day < _next_month(day),
        )
    ).scalar_one()
    return policy.monthly_calls - used


def _next_month(day: date) -> date:
    return (day.replace(day=1) + timedelta(days=32)).replace(day=1)


def _check_rate(tx: Tx, policy: CallPolicy, state: Row[Any]) -> TooSoon | None:
    """One call each 1/rate seconds, over all replicas. state: its row, locked."""
    if not policy.calls_per_second or state.next_call_at is None:
        return None
    seconds = _seconds_until(tx, state.next_call_at)
    return TooSoon(seconds) if seconds > 0 else None


def _seconds_until(tx: Tx, when: datetime) -> float:
    now: datetime = tx.execute(select(tx.now())).scalar_one()
    return (when - now).total_seconds()


def _counting(put: Any) -> Prepared:
    insertion = put(usage)
    added = {
        name: usage.c[name] + insertion.excluded[name] for name in ("calls", "reused", "refused")
    }
    by_day = [usage.c.extension, usage.c.day]
    return Prepared(insertion.on_conflict_do_update(index_elements=by_day, set_=added))


_count_on_postgres = _counting(postgresql.insert)
_count_on_sqlite = _counting(sqlite.insert)


def _count(
    tx: Tx, extension: str, day: date, *, calls: int = 0, reused: int = 0, refused: int = 0
) -> None:
    count = _count_on_postgres if tx.is_postgres else _count_on_sqlite
    count.run(tx, extension=extension, day=day, calls=calls, reused=reused, refused=refused)


def callable_now(tx: Tx, limits: dict[str, int], background_slots: int) -> dict[str, int]:
    """`limits`, lowered to what the background may call now: not more than there are free slots,
    none while the breaker is open, one probe where it may close.

    Bad credentials hold nothing back: runs fail at once then.
    """
    probes, free = _probes(tx), _free_slots(tx, background_slots)
    return {e: min(n, probes.get(e, n), free.get(e, n)) for e, n in limits.items()}


_read_open_breakers = Prepared(
    select(
        provider_states.c.extension, (provider_states.c.opened_until <= now_plus()).label("probe")
    ).where(
        provider_states.c.opened_until.is_not(None),
        provider_states.c.opened_for != Reason.CREDENTIALS,
    )
)


def _probes(tx: Tx) -> dict[str, int]:
    """extension -> how many calls its open breaker lets through."""
    return {row.extension: 1 if row.probe else 0 for row in _read_open_breakers.all(tx)}


_count_free_slots = Prepared(
    select(slots.c.extension, func.count().filter(_is_free()).label("free"))
    .where(slots.c.number < bindparam("end"))
    .group_by(slots.c.extension)
)


def _free_slots(tx: Tx, background_slots: int) -> dict[str, int]:
    """extension -> how many the background may take."""
    if not tx.is_postgres:
        return {}
    return {row.extension: row.free for row in _count_free_slots.all(tx, end=background_slots)}


def forget_expired_answers(tx: Tx, limit: int = 500) -> int:
    """Deletes some answers past their time. Returns how many."""
    now = select(tx.now()).scalar_subquery()  # evaluated once, so that the index is searched by it
    expired = select(answers.c.key).where(answers.c.expires_at <= now).limit(limit)
    return tx.execute(delete(answers).where(answers.c.key.in_(expired))).rowcount
