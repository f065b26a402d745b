"""Leases on the rows of both tables that are queues, on both databases."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from sqlalchemy import ColumnElement, Row, Table, insert, select, update

from app import jobs
from app.db import Database, Tx
from app.webhooks.models import deliveries
from tests.files.support import SetClock
from tests.test_db import Running, on_postgres, on_sqlite

TABLE: Table = deliveries


@pytest.fixture
def running(database_url: str) -> Iterator[Running]:
    running = Running(database_url)
    yield running
    running.close()


def add(tx: Tx, row_id: str, due_in: float = -1, *, host: str = "h", **values: Any) -> None:
    tx.execute(
        insert(TABLE).values(
            **{
                "id": row_id,
                "run_id": f"run of {row_id}",
                "url": "http://h",
                "host": host,
                "body": b"",
                "request_id": "r",
                "status": jobs.PENDING,
                "attempts": 0,
                "due_at": tx.now(due_in),
                "created_at": tx.clock.now(),
                **values,
            }
        )
    )


def claim(
    tx: Tx, /, owner: str, limit: int, *where: ColumnElement[bool], **also_set: Any
) -> list[Row[Any]]:
    return jobs.claim(tx, jobs.claiming(TABLE, *where, **also_set), owner, limit)


class Queue:
    def __init__(self, running: Running) -> None:
        self._running = running
        self.db: Database = running.db

    def write(self, function: Any, *arguments: Any, **named: Any) -> Any:
        return self._running.run(self.db.write(function, *arguments, **named))

    def add(self, row_id: str, due_in: float = -1, **values: Any) -> None:
        self.write(add, row_id, due_in, **values)

    def claim(self, owner: str = "me", limit: int = 100, *where: Any) -> list[str]:
        return sorted(row.id for row in self.write(claim, owner, limit, *where))

    def row(self, row_id: str) -> Row[Any]:
        statement = select(TABLE).where(TABLE.c.id == row_id)
        return self._running.run(self.db.read(lambda tx: tx.execute(statement).one()))

    def change(self, row_id: str, **values: Any) -> None:
        self.write(lambda tx: _change(tx, row_id, values))

    def let_lease_run_out(self, row_id: str) -> None:
        self.write(lambda tx: _change(tx, row_id, {"lease_until": tx.now(-1)}))

    def run(self, coroutine: Any) -> Any:
        return self._running.run(coroutine)


def _change(tx: Tx, row_id: str, values: dict[str, Any]) -> None:
    tx.execute(update(TABLE).where(TABLE.c.id == row_id).values(**values))


@pytest.fixture
def queue(running: Running) -> Queue:
    return Queue(running)


# Claiming


def test_claim_takes_what_is_due_and_leases_it(queue: Queue) -> None:
    queue.add("due")
    queue.add("later", due_in=60)
    queue.add("done", status="delivered")
    assert queue.claim("me") == ["due"]
    row = queue.row("due")
    assert (row.attempts, row.lease_owner) == (1, "me")
    assert row.lease_until is not None
    assert queue.row("later").attempts == 0


def test_what_is_leased_is_not_claimed_again(queue: Queue) -> None:
    queue.add("a")
    assert queue.claim() == ["a"]
    assert queue.claim() == []


def test_longest_due_is_claimed_first(queue: Queue) -> None:
    for number, due_in in enumerate([-1, -3, -2, -5, -4]):
        queue.add(f"{number}", due_in)
    assert queue.claim("me", 2) == ["3", "4"]
    assert queue.claim("me", 2) == ["1", "2"]
    assert queue.claim("me", 2) == ["0"]


def test_claim_keeps_to_its_condition(queue: Queue) -> None:
    queue.add("a", host="one")
    queue.add("b", host="two")
    assert queue.claim("me", 10, TABLE.c.host == "two") == ["b"]


def test_claim_sets_what_it_is_told_beside(queue: Queue) -> None:
    queue.add("a")
    queue.write(claim, "me", 1, last_error="taken over")
    assert queue.row("a").last_error == "taken over"


def test_lease_that_has_run_out_is_taken_over_with_the_next_number(queue: Queue) -> None:
    queue.add("a")
    queue.claim("first")
    queue.let_lease_run_out("a")
    assert queue.claim("second") == ["a"]
    row = queue.row("a")
    assert (row.attempts, row.lease_owner) == (2, "second")


def test_claims_at_once_share_the_rows_and_take_none_twice(queue: Queue) -> None:
    for number in range(40):
        queue.add(f"{number:02}")

    async def claim_all() -> list[list[Row[Any]]]:
        return await asyncio.gather(*[queue.db.write(claim, f"{n}", 7) for n in range(10)])

    claimed = [row.id for rows in queue.run(claim_all()) for row in rows]
    claimed += queue.claim("last")
    assert sorted(claimed) == [f"{number:02}" for number in range(40)]


@on_postgres
def test_claim_does_not_wait_for_a_row_that_another_is_claiming(queue: Queue) -> None:
    queue.add("locked", due_in=-5)
    queue.add("free")

    async def both() -> tuple[Any, Any]:
        locked, over = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def lock(tx: Tx) -> None:
            tx.execute(select(TABLE).where(TABLE.c.id == "locked").with_for_update())
            loop.call_soon_threadsafe(locked.set)
            asyncio.run_coroutine_threadsafe(over.wait(), loop).result(10)

        locking = asyncio.create_task(queue.db.write(lock))
        await locked.wait()
        rows = await queue.db.write(claim, "me", 10)
        over.set()
        await locking
        return rows, None

    rows, _ = queue.run(both())
    assert [row.id for row in rows] == ["free"]


# Fencing


def test_only_the_latest_claim_of_a_pending_row_holds_it(queue: Queue) -> None:
    queue.add("a")
    queue.claim("first")
    queue.let_lease_run_out("a")
    queue.claim("second")

    def holds(tx: Tx, attempt: int) -> bool:
        statement = select(TABLE).where(jobs.is_held(TABLE, "a", attempt))
        return tx.execute(statement).first() is not None

    assert [queue.write(holds, attempt) for attempt in (1, 2, 3)] == [False, True, False]
    queue.change("a", status="delivered")
    assert not queue.write(holds, 2)


# Renewing and releasing


def test_renewal_prolongs_what_is_worked_on_and_nothing_else(queue: Queue) -> None:
    rows = ("worked on", "lost sight of", "another's", "done")
    for row_id in rows:
        queue.add(row_id)
        queue.claim("another" if row_id == "another's" else "me")
    queue.change("done", status="delivered")
    for row_id in rows:
        queue.let_lease_run_out(row_id)
    before = {row_id: queue.row(row_id).lease_until for row_id in ("worked on", "done")}
    held = {TABLE: {"worked on", "another's", "done"}}
    queue.write(jobs.renew_leases, held, "me")
    assert queue.row("worked on").lease_until > before["worked on"]
    assert queue.row("done").lease_until == before["done"]
    assert queue.claim("third") == ["another's", "lost sight of"]


def test_renewal_of_nothing_is_nothing(queue: Queue) -> None:
    queue.write(jobs.renew_leases, {TABLE: set()}, "me")


def test_release_gives_back_what_one_owner_holds(queue: Queue) -> None:
    for row_id, owner in (("a", "me"), ("b", "another")):
        queue.add(row_id)
        queue.claim(owner)
    queue.write(jobs.release_leases, [TABLE], "me")
    assert queue.claim("third") == ["a"]


def test_release_without_an_owner_gives_back_everything(queue: Queue) -> None:
    for row_id, owner in (("a", "me"), ("b", "another")):
        queue.add(row_id)
        queue.claim(owner)
    queue.write(jobs.release_leases, [TABLE])
    assert queue.claim("third") == ["a", "b"]


# When to look again


def test_seconds_to_next_due(queue: Queue) -> None:
    def seconds() -> float | None:
        found: float | None = queue.run(queue.db.read(jobs.seconds_to_next_due, TABLE))
        return found

    assert seconds() is None
    queue.add("done", due_in=-5, status="delivered")
    queue.add("leased", due_in=-5, lease_until=SetClock().now(), lease_owner="me")
    assert seconds() is None
    queue.add("later", due_in=60)
    found = seconds()
    assert found is not None
    assert 50 < found <= 60
    queue.add("due", due_in=-5)
    found = seconds()
    assert found is not None
    assert found < 0


def test_backoff_doubles_with_full_jitter_up_to_ten_minutes() -> None:
    for attempts, longest in [(1, 1), (2, 2), (3, 4), (10, 512), (11, 600), (1000, 600)]:
        drawn = [jobs.backoff_seconds(attempts) for _ in range(300)]
        assert min(drawn) >= 0
        assert max(drawn) <= longest
        assert max(drawn) > 0.9 * longest
        assert min(drawn) < 0.1 * longest


# The loop


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.001)


class Worker:
    """A loop over the table; what it has handled, and what it fails to."""

    def __init__(self, queue: Queue, *, limit: int = 100) -> None:
        self.held: set[str] = set()
        self.handled: list[str] = []
        self.claims = 0
        self.problem: Exception | None = None
        self.claim_problem: Exception | None = None
        self.changed = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self._queue = queue
        self._limit = limit
        self.loop = jobs.DueLoop(TABLE, queue.db, self._take, self._handle, self.held)

    async def _take(self) -> Sequence[Row[Any]]:
        self.claims += 1
        self.changed.set()
        if self.claim_problem is not None:
            raise self.claim_problem
        return await self._queue.db.write(claim, "me", self._limit)

    async def _handle(self, row: Row[Any]) -> None:
        await self.gate.wait()
        if self.problem is not None:
            raise self.problem
        await self._queue.db.write(_change, row.id, jobs.unleased(status="delivered"))
        self.handled.append(row.id)
        self.changed.set()

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    async def during(self, work: Any) -> None:
        task = asyncio.create_task(self.loop.run())
        try:
            await work
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def test_loop_handles_what_is_due_and_then_what_becomes_due(queue: Queue) -> None:
    queue.add("now")
    queue.add("soon", due_in=0.1)

    async def work() -> None:
        worker = Worker(queue)
        await worker.during(worker.until(lambda: worker.handled == ["now", "soon"]))
        assert worker.held == set()

    queue.run(work())


def test_loop_wakes_at_once_when_told(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 60.0)

    async def work() -> None:
        worker = Worker(queue)

        async def add_later() -> None:
            await worker.until(lambda: worker.claims == 1)
            await asyncio.sleep(0.05)
            await queue.db.write(lambda tx: add(tx, "a"))
            worker.loop.wake()
            await worker.until(lambda: worker.handled == ["a"])

        await worker.during(add_later())

    queue.run(work())


def test_loop_looks_again_by_itself_for_what_others_have_added(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.1)

    async def work() -> None:
        worker = Worker(queue)

        async def add_later() -> None:
            await worker.until(lambda: worker.claims == 1)
            await queue.db.write(lambda tx: add(tx, "a"))
            await worker.until(lambda: worker.handled == ["a"])

        await worker.during(add_later())

    queue.run(work())


def test_loop_takes_more_when_a_slot_becomes_free(queue: Queue) -> None:
    for number in range(5):
        queue.add(f"{number}", due_in=-5 + number)

    async def work() -> None:
        worker = Worker(queue, limit=1)
        await worker.during(worker.until(lambda: len(worker.handled) == 5))

    queue.run(work())


def test_loop_holds_what_it_works_on_and_lets_go_of_what_failed(queue: Queue) -> None:
    queue.add("a")

    async def work() -> None:
        worker = Worker(queue)
        worker.gate.clear()
        worker.problem = RuntimeError("as the test wished")

        async def fail() -> None:
            await until(lambda: worker.held == {"a"})
            worker.gate.set()
            await until(lambda: not worker.held)
            worker.problem = None
            await queue.db.write(lambda tx: _change(tx, "a", {"lease_until": tx.now(-1)}))
            worker.loop.wake()
            await worker.until(lambda: worker.handled == ["a"])

        await worker.during(fail())

    queue.run(work())


def test_loop_outlives_a_database_that_fails(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 0.05)
    queue.add("a")

    async def work() -> None:
        worker = Worker(queue)
        worker.claim_problem = RuntimeError("as the test wished")

        async def recover() -> None:
            await worker.until(lambda: worker.claims >= 2)
            worker.claim_problem = None
            await worker.until(lambda: worker.handled == ["a"])

        await worker.during(recover())

    queue.run(work())


def test_loop_that_is_cancelled_cancels_what_it_works_on(queue: Queue) -> None:
    queue.add("a")

    async def work() -> None:
        worker = Worker(queue)
        worker.gate.clear()
        await worker.during(worker.until(lambda: worker.claims >= 1))
        worker.gate.set()
        await asyncio.sleep(0.01)
        assert worker.handled == []

    queue.run(work())


@on_sqlite
def test_keeping_leases_goes_on_after_a_failure(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RENEW_SECONDS", 0.02)
    queue.add("a")
    queue.claim("me")
    queue.let_lease_run_out("a")
    before = queue.row("a").lease_until

    class Held(dict[Table, set[str]]):
        fails = 2

        def items(self) -> Any:
            if self.fails:
                self.fails -= 1
                raise RuntimeError("as the test wished")
            return super().items()

    async def work() -> None:
        held = Held({TABLE: {"a"}})
        keeping = asyncio.create_task(jobs.keep_leases(queue.db, held, "me"))
        await until(lambda: not held.fails)
        await asyncio.sleep(0.1)
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

    queue.run(work())
    assert queue.row("a").lease_until > before
