"""Transactions on webhook deliveries: written with their cause, claimed, recorded."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from heapq import heapify, heappop, heappush
from typing import Any
from urllib.parse import urlsplit

import orjson
from sqlalchemy import (
    ColumnElement,
    Row,
    ScalarSelect,
    Select,
    Text,
    bindparam,
    insert,
    or_,
    select,
    update,
)

from app import jobs
from app.db import Tx, now_plus
from app.ids import new_id
from app.notify import notify_due
from app.prepared import Prepared, given
from app.webhooks.models import DEAD, DELIVERED, attempts, deliveries

PER_HOST = 4
DEADLINE_SECONDS = 24 * 3600
JITTER = 0.2


_insert_delivery = Prepared(
    insert(deliveries).values(
        **given(deliveries, "id", "run_id", "url", "host", "body", "request_id", "created_at"),
        status=jobs.PENDING,
        attempts=0,
        due_at=now_plus(bindparam("delay")),
    )
)


def enqueue(
    tx: Tx, *, run_id: str, url: str, payload: dict[str, Any], request_id: str, first_delay: float
) -> None:
    """Writes a delivery with its exact body. It exists exactly if its cause is committed."""
    _insert_delivery.run(
        tx,
        id=f"evt_{new_id()}",
        run_id=run_id,
        url=url,
        host=host_of(url),
        body=orjson.dumps(payload),
        request_id=request_id,
        delay=jittered(first_delay),
        created_at=tx.clock.now(),
    )
    notify_due(tx, deliveries)


def host_of(url: str) -> str:
    """Host and port: what `PER_HOST` is counted by."""
    return urlsplit(url).netloc.lower()


def jittered(seconds: float) -> float:
    return seconds * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311


_claim_to_host = jobs.claiming(deliveries, deliveries.c.host == bindparam("host"))


def claim_deliveries(
    tx: Tx, owner: str, in_flight: Mapping[str, int], limit: int, last_host: str = ""
) -> list[Row[Any]]:
    """Due deliveries, at most PER_HOST in flight to each host, so that a slow one delays none.

    in_flight: of this process. limit: how many may be claimed. They are shared evenly among the
    hosts, whose turns go round and start behind `last_host`, the one that got the last place.
    """
    full = [host for host, count in in_flight.items() if count >= PER_HOST]
    # So many, that `limit` of them have none in flight, if so many there are.
    hosts = _due_hosts(tx, full, last_host, limit + len(in_flight))
    claimed: list[Row[Any]] = []
    for host, places in share_places(hosts, in_flight, limit).items():
        claimed += jobs.claim(tx, _claim_to_host, owner, places, host=host)
    return claimed


def share_places(
    hosts: Sequence[str], in_flight: Mapping[str, int], limit: int
) -> Mapping[str, int]:
    """How many each host gets: one by one to whoever has the fewest, in the order of `hosts`."""
    queue = [(in_flight.get(host, 0), turn, host) for turn, host in enumerate(hosts)]
    heapify(queue)
    places: Counter[str] = Counter()
    while queue and limit > 0:
        count, turn, host = heappop(queue)
        places[host] += 1
        limit -= 1
        if count + 1 < PER_HOST:
            heappush(queue, (count + 1, turn, host))
    return places


def _due_hosts(tx: Tx, full: Sequence[str], last_host: str, limit: int) -> list[str]:
    """Hosts with due deliveries but the full ones, from `last_host` round to itself."""
    hosts = _hosts_behind(tx, last_host, full, limit)
    if len(hosts) < limit and last_host:
        hosts = list(dict.fromkeys([*hosts, *_hosts_behind(tx, "", full, limit)]))
    return hosts


def _hosts_behind(tx: Tx, host: str, full: Sequence[str], limit: int) -> list[str]:
    """Hosts that sort behind `host`, with due deliveries, but the full ones."""
    due = _due_hosts_behind.all(tx, behind=host, limit=limit + len(full))
    return [row.host for row in due if row.host not in full][:limit]


def _select_due_hosts() -> Select[tuple[str]]:
    """Jumps from host to host through the index (a loose index scan): a host with thousands of rows
    costs no more than one with a single row.
    """
    first = select(_next_host(bindparam("behind", type_=Text)).label("host"))
    hosts = first.cte("hosts", recursive=True)
    hosts = hosts.union_all(select(_next_host(hosts.c.host)).where(hosts.c.host.is_not(None)))
    now = select(now_plus()).scalar_subquery()
    at_rest = _has_pending(
        hosts.c.host, deliveries.c.lease_until.is_(None), deliveries.c.due_at <= now
    )
    lost = _has_pending(hosts.c.host, deliveries.c.lease_until < now)
    due = select(hosts.c.host).where(hosts.c.host.is_not(None), or_(at_rest, lost))
    return due.limit(bindparam("limit"))


def _has_pending(host: ColumnElement[str], *where: ColumnElement[bool]) -> ColumnElement[bool]:
    """In the index's order, or PostgreSQL may hope to meet such a row soon in the whole table."""
    first = (
        select(deliveries.c.id)
        .where(deliveries.c.status == jobs.PENDING, deliveries.c.host == host, *where)
        .order_by(deliveries.c.lease_until, deliveries.c.due_at)
        .limit(1)
    )
    return first.scalar_subquery().is_not(None)


def _next_host(host: ColumnElement[str]) -> ScalarSelect[str]:
    return (
        select(deliveries.c.host)
        .where(deliveries.c.status == jobs.PENDING, deliveries.c.host > host)
        .order_by(deliveries.c.host)
        .limit(1)
        .scalar_subquery()
    )


_due_hosts_behind = Prepared(_select_due_hosts())


_lock_held = Prepared(
    select(deliveries)
    .where(jobs.is_held(deliveries, bindparam("delivery_id"), bindparam("attempt")))
    .with_for_update()
)
_insert_attempt = Prepared(insert(attempts))


def record_attempt(
    tx: Tx,
    delivery_id: str,
    attempt: int,
    schedule: tuple[float, ...],
    *,
    started_at: datetime,
    elapsed_ms: int,
    status_code: int | None,
    error: str | None,
    reply_beginning: bytes,
    retry_after: str | None,
) -> None:
    """Writes the attempt down, and what follows from it. A no-op if the claim is not the latest."""
    delivery = _lock_held.one_or_none(tx, delivery_id=delivery_id, attempt=attempt)
    if delivery is None:
        return
    _insert_attempt.run(
        tx,
        delivery_id=delivery_id,
        number=attempt,
        started_at=started_at,
        elapsed_ms=elapsed_ms,
        status_code=status_code,
        error=error,
        reply_beginning=reply_beginning,
    )
    after = _after_attempt(tx, delivery, schedule, started_at, status_code, error, retry_after)
    tx.execute(
        update(deliveries)
        .where(deliveries.c.id == delivery_id)
        .values(jobs.unleased(first_attempt_at=delivery.first_attempt_at or started_at, **after))
    )


def is_expired(delivery: Row[Any], now: datetime) -> bool:
    """True when no further attempt may start, because nobody could make it in time."""
    first = delivery.first_attempt_at
    return first is not None and (now - first).total_seconds() > DEADLINE_SECONDS


def give_up(tx: Tx, delivery_id: str, attempt: int) -> None:
    """Ends an expired delivery without another attempt."""
    tx.execute(
        update(deliveries)
        .where(jobs.is_held(deliveries, delivery_id, attempt))
        .values(jobs.unleased(status=DEAD, finished_at=tx.clock.now()))
    )


def _after_attempt(
    tx: Tx,
    delivery: Row[Any],
    schedule: tuple[float, ...],
    started_at: datetime,
    status_code: int | None,
    error: str | None,
    retry_after: str | None,
) -> dict[str, Any]:
    """Column values: delivered, dead, or due again."""
    ended = {"finished_at": tx.clock.now()}
    if status_code is not None and 200 <= status_code < 300:
        return {"status": DELIVERED, "last_error": None, **ended}
    problem = error or f"status {status_code}"
    delay = delay_before(schedule, delivery.attempts + 1)
    if retry_after is not None:
        delay = min(max(delay, seconds_of(retry_after, tx.clock.wall()) or 0), 2 * delay)
    first = delivery.first_attempt_at or started_at
    seconds_used = (tx.clock.now() - first).total_seconds()
    gone = status_code == 410
    if gone or seconds_used + delay > DEADLINE_SECONDS:
        return {"status": DEAD, "last_error": problem, **ended}
    return {"due_at": tx.now(delay), "last_error": problem}


def delay_before(schedule: tuple[float, ...], attempt: int) -> float:
    """Seconds to wait before an attempt (1 is the first), with jitter; the last entry repeats."""
    return jittered(schedule[min(attempt, len(schedule)) - 1])


def seconds_of(retry_after: str, now: datetime) -> float | None:
    """A Retry-After header in seconds from now; None if it is neither a number nor a date."""
    if retry_after.strip().isascii() and retry_after.strip().isdigit():
        return float(retry_after.strip()[:9])
    try:
        when = parsedate_to_datetime(retry_after)
    except (ValueError, TypeError, OverflowError):
        return None
    return (when - now).total_seconds() if when.tzinfo else None
