"""The rows are the queue: claim what is due, run it, retry or finish it.

An extension run and a webhook delivery carry the columns of `Leased`; nothing here knows more of
them. A claim is a lease: when its holder dies, the lease runs out and anyone takes the row again.
Whoever finishes a row says `WHERE status = 'pending' AND attempts = :mine`, so one writer wins.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from datetime import datetime
from functools import cache, partial
from typing import Any

import structlog
from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    Table,
    Text,
    and_,
    bindparam,
    func,
    literal_column,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Database, Tx, UtcDateTime, now_plus
from app.notify import notify_due
from app.prepared import Prepared

log = structlog.get_logger(__name__)

PENDING = "pending"
LEASE_SECONDS = 15.0
RENEW_SECONDS = 5.0
POLL_SECONDS = 1.0


class Leased:
    """Columns of a row that is work to do.

    attempts: how often it has been claimed, and the fencing token of the latest claim.
    """

    status: Mapped[str] = mapped_column(Text)
    attempts: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime] = mapped_column(UtcDateTime)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    lease_owner: Mapped[str | None] = mapped_column(Text)
    last_error: Mapped[str | None] = mapped_column(Text)


def claim(tx: Tx, claiming: Prepared, owner: str, limit: int, **parameters: Any) -> list[Row[Any]]:
    """Leases up to `limit` due rows to `owner` and returns them."""
    return claiming.all(tx, owner=owner, limit=limit, lease_seconds=LEASE_SECONDS, **parameters)


def claiming(table: Table, *where: ColumnElement[bool], **also_set: Any) -> Prepared:
    """What `claim` runs. where: may have parameters of its own.

    Rows whose lease has run out come first, then the longest due. Each part reads one range of
    the table's index, in its order, so what is leased or not yet due is not looked at.
    """
    now = select(now_plus()).scalar_subquery()  # evaluated once, else no index is searched by it
    lost = _lock(table, *where, table.c.lease_until < now)
    due = _lock(table, *where, table.c.lease_until.is_(None), table.c.due_at <= now)
    found = union_all(select(lost.cte("lost")), select(due.cte("due")))
    return Prepared(
        update(table)
        .where(table.c.id.in_(found.limit(bindparam("limit"))))
        .values(attempts=table.c.attempts + 1, **lease(), **also_set)
        .returning(*table.c)
    )


def _lock(table: Table, *where: ColumnElement[bool]) -> Select[Any]:
    """Ids of pending rows that nobody else is claiming."""
    return (
        select(table.c.id)
        .where(_is_pending(table), *where)
        .order_by(table.c.lease_until, table.c.due_at)
        .limit(bindparam("limit"))
        .with_for_update(skip_locked=True)
    )


def _is_pending(table: Table) -> ColumnElement[bool]:
    """A part of the statement, not a parameter, so that every plan may use a partial index."""
    return table.c.status == literal_column(f"'{PENDING}'")


def lease() -> dict[str, Any]:
    """Column values of a row that `owner` holds for `lease_seconds` from now: parameters."""
    return {"lease_until": now_plus(bindparam("lease_seconds")), "lease_owner": bindparam("owner")}


def unleased(**values: Any) -> dict[str, Any]:
    """Column values of a row that nobody holds any more."""
    return {"lease_until": None, "lease_owner": None, **values}


def is_held(table: Table, row_id: Any, attempt: Any) -> ColumnElement[bool]:
    """True while the claim with this token is the latest, and the row is not finished.

    row_id, attempt: values, or the parameters that stand for them.
    """
    return and_(table.c.id == row_id, table.c.status == PENDING, table.c.attempts == attempt)


def renew_leases(tx: Tx, held: Mapping[Table, Collection[str]], owner: str) -> None:
    """Of the rows that are being worked on, by their ids.

    A row that was leased but lost sight of, since a transaction failed, is left to its lease.
    """
    for table, ids in held.items():
        if ids:
            mine = (table.c.id.in_(list(ids)), table.c.lease_owner == owner, _is_pending(table))
            tx.execute(update(table).where(*mine).values(lease_until=tx.now(LEASE_SECONDS)))


def release_leases(tx: Tx, tables: Sequence[Table], owner: str | None = None) -> None:
    """Gives back what `owner` holds; without an owner, whatever anyone holds."""
    for table in tables:
        held = table.c.lease_owner.is_not(None) if owner is None else table.c.lease_owner == owner
        if tx.execute(update(table).where(held).values(unleased())).rowcount:
            notify_due(tx, table)


def seconds_to_next_due(tx: Tx, table: Table) -> float | None:
    """Until the next unleased row is due; None without one. Negative if one is due already."""
    row = _next_due(table).one_or_none(tx)
    return None if row.due_at is None else float((row.due_at - row.now).total_seconds())


@cache
def _next_due(table: Table) -> Prepared:
    next_due = select(func.min(table.c.due_at)).where(
        _is_pending(table), table.c.lease_until.is_(None)
    )
    return Prepared(select(next_due.scalar_subquery().label("due_at"), now_plus().label("now")))


def longest_wait_seconds(tx: Tx, table: Table, *where: ColumnElement[bool]) -> float:
    """How long the longest due row has waited for anyone to take it; 0 if none waits."""
    now = select(tx.now()).scalar_subquery()
    is_free = or_(table.c.lease_until.is_(None), table.c.lease_until < now)
    since = tx.execute(
        select(func.min(table.c.due_at)).where(
            table.c.status == PENDING, table.c.due_at <= now, is_free, *where
        )
    ).scalar_one()
    if since is None:
        return 0.0
    return float((tx.execute(select(tx.now())).scalar_one() - since).total_seconds())


def backoff_seconds(attempts: int, *, first: float = 1.0, longest: float = 600.0) -> float:
    """Full jitter below an exponential: between 0 and first, 2 first, 4 first ... longest."""
    return random.uniform(0, min(longest, first * 2 ** min(attempts - 1, 30)))  # noqa: S311


class DueLoop:
    """Claims what is due in one table and runs a handler for each row, many at once.

    take: claims rows that can be worked on now (it knows its own limits).
    handle: works on one row and records its own result. Raises if it could not, and the row is
    then left to its lease. held: the ids of the rows that are being worked on.
    """

    def __init__(
        self,
        table: Table,
        db: Database,
        take: Callable[[], Awaitable[Sequence[Row[Any]]]],
        handle: Callable[[Row[Any]], Coroutine[Any, Any, None]],
        held: set[str],
    ) -> None:
        self._table = table
        self._db = db
        self._take = take
        self._handle = handle
        self._held = held
        self._wake = asyncio.Event()
        self._working: set[asyncio.Task[None]] = set()
        self._is_stopping = False

    def stop(self) -> None:
        """Claims nothing more; what is being worked on goes on."""
        self._is_stopping = True
        self._wake.set()

    @property
    def working(self) -> set["asyncio.Task[None]"]:
        """What is being worked on."""
        return set(self._working)

    def wake(self) -> None:
        """Something became due."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled; the rows being worked on are then given up to their leases."""
        try:
            while not self._is_stopping:
                self._wake.clear()
                if not await self._start_what_is_due():
                    await self._sleep()
            await asyncio.gather(*self._working, return_exceptions=True)
        finally:
            for task in self._working:
                task.cancel()
            await asyncio.gather(*self._working, return_exceptions=True)

    async def _start_what_is_due(self) -> int:
        try:
            rows = await self._take()
        except Exception as error:
            log.error("cannot claim", table=self._table.name, exc_info=error)
            return 0
        for row in rows:
            task = asyncio.create_task(self._handle(row))
            self._working.add(task)
            self._held.add(row.id)
            task.add_done_callback(partial(self._done, row.id))
        return len(rows)

    def _done(self, row_id: str, task: "asyncio.Task[None]") -> None:
        self._working.discard(task)
        self._held.discard(row_id)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("cannot finish", table=self._table.name, exc_info=error)
        self._wake.set()

    async def _sleep(self) -> None:
        try:
            async with asyncio.timeout(await self._seconds_to_sleep()):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _seconds_to_sleep(self) -> float:
        try:
            next_due = await self._db.read(seconds_to_next_due, self._table)
        except Exception as error:
            log.error("cannot look for due rows", table=self._table.name, exc_info=error)
            return POLL_SECONDS
        # A row that is due but was not claimed waits for a free slot, whose end wakes the loop.
        return POLL_SECONDS if next_due is None or next_due <= 0 else min(POLL_SECONDS, next_due)


async def keep_leases(db: Database, held: Mapping[Table, Collection[str]], owner: str) -> None:
    """Renews the leases of all that this process works on, for as long as it lives."""
    while True:
        await asyncio.sleep(RENEW_SECONDS)
        if not any(held.values()):
            continue
        try:
            await db.write(renew_leases, {t: set(ids) for t, ids in held.items()}, owner)
        except Exception as error:
            log.error("cannot renew leases", exc_info=error)
