"""Transactions as callers meet them, on both databases."""

import asyncio
import errno
import os
import shutil
import threading
import time
from collections.abc import Coroutine, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import create_engine, insert, literal, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.pool import NullPool

from app.clock import Clock
from app.db import (
    POSTGRES_THREADS,
    Database,
    ProcessLock,
    SqliteDatabase,
    Tx,
    UtcDateTime,
    open_database,
)
from app.files.models import folders
from app.ids import new_id
from app.keys import generated_secrets
from app.settings import Settings, SettingsError, load_settings

T = TypeVar("T")

on_sqlite = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
on_postgres = pytest.mark.parametrize(
    "database_url", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True
)


class Watched(Tx):
    """Notes the statements, with their parameters, that are run without SQLAlchemy's own work."""

    def __init__(self, tx: Tx) -> None:
        super().__init__(tx._connection, tx.clock)
        self.statements: list[tuple[str, Any]] = []

    def execute_driver(self, sql: str, arguments: Any = ()) -> Any:
        self.statements.append((sql, arguments))
        return super().execute_driver(sql, arguments)


class Running:
    """A database and an event loop for it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_closed = False
        self._runner = asyncio.Runner()
        self.db: Database = self.run(self._open())

    async def _open(self) -> Database:
        return open_database(load_settings(Settings, database_url=self.url), Clock())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(coroutine)

    def together(self, *functions: Any) -> list[Any]:
        """The results or errors of writes that are asked for at once."""

        async def all_of_them() -> list[Any]:
            writes = [self.db.write(function) for function in functions]
            return await asyncio.gather(*writes, return_exceptions=True)

        return self.run(all_of_them())

    def names(self) -> set[str]:
        statement = select(generated_secrets.c.name)
        return set(self.run(self.db.read(lambda tx: tx.execute(statement).scalars().all())))

    def close(self) -> None:
        if not self.is_closed:
            self.run(self.db.close())
        self._runner.close()


@pytest.fixture
def running(database_url: str) -> Iterator[Running]:
    running = Running(database_url)
    yield running
    running.close()


def put(tx: Tx, name: str, value: str = "v") -> str:
    tx.execute(insert(generated_secrets).values(name=name, value=value))
    return name


class Refused(Exception):
    pass


# One transaction


def test_write_returns_what_the_function_returns_and_it_stays(running: Running) -> None:
    assert running.run(running.db.write(put, "a")) == "a"
    assert running.names() == {"a"}


def test_write_that_raises_leaves_nothing_and_its_caller_sees_the_error(running: Running) -> None:
    def refuse(tx: Tx) -> None:
        put(tx, "a")
        raise Refused

    with pytest.raises(Refused):
        running.run(running.db.write(refuse))
    assert running.names() == set()


def test_read_and_scan_see_what_was_written(running: Running) -> None:
    def count(tx: Tx, at_least: str) -> int:
        found = tx.execute(select(generated_secrets).where(generated_secrets.c.name >= at_least))
        return len(found.all())

    running.run(running.db.write(put, "a"))
    running.run(running.db.write(put, "b"))
    assert running.run(running.db.read(count, "b")) == 1
    assert running.run(running.db.scan(count, at_least="a")) == 2


def test_reading_transaction_sees_one_moment_however_many_its_statements(running: Running) -> None:
    looked, go_on = threading.Event(), threading.Event()

    def look_twice(tx: Tx) -> tuple[int, int]:
        statement = select(generated_secrets)
        first = len(tx.execute(statement).all())
        looked.set()
        assert go_on.wait(10)
        return first, len(tx.execute(statement).all())

    async def write_in_between() -> tuple[int, int]:
        reading = asyncio.create_task(running.db.scan(look_twice))
        await asyncio.to_thread(looked.wait, 10)
        await running.db.write(put, "a")
        go_on.set()
        return await reading

    assert running.run(write_in_between()) == (0, 0)


def test_read_that_raises_leaves_the_next_one_unharmed(running: Running) -> None:
    def refuse(tx: Tx) -> None:
        tx.execute(select(generated_secrets)).all()
        raise Refused

    for way in (running.db.read, running.db.scan):
        with pytest.raises(Refused):
            running.run(way(refuse))
    assert running.names() == set()


def test_caller_that_is_cancelled_does_not_cancel_its_write(running: Running) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slowly(tx: Tx) -> None:
        put(tx, "a")
        entered.set()
        assert go_on.wait(10)

    async def cancel() -> None:
        task = asyncio.create_task(running.db.write(slowly))
        await asyncio.to_thread(entered.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await running.db.write(put, "b")

    running.run(cancel())
    deadline = time.monotonic() + 10
    while running.names() != {"a", "b"}:
        assert time.monotonic() < deadline


def test_write_that_waits_for_its_turn_is_made_although_its_caller_was_cancelled(
    running: Running,
) -> None:
    go_on = threading.Event()

    def occupy(tx: Tx) -> None:
        assert go_on.wait(10)

    async def cancel() -> None:
        busy = [asyncio.create_task(running.db.write(occupy)) for _ in range(POSTGRES_THREADS)]
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(running.db.write(put, "a"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        go_on.set()
        await asyncio.gather(*busy)
        await running.db.write(put, "b")

    running.run(cancel())
    deadline = time.monotonic() + 10
    while running.names() != {"a", "b"}:
        assert time.monotonic() < deadline


def test_write_whose_caller_was_cancelled_may_fail_quietly(running: Running) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def fail(tx: Tx) -> None:
        entered.set()
        assert go_on.wait(10)
        raise Refused

    async def cancel() -> None:
        task = asyncio.create_task(running.db.write(fail))
        await asyncio.to_thread(entered.wait, 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go_on.set()
        await running.db.write(put, "b")

    running.run(cancel())


def test_writes_that_are_under_way_are_finished_when_the_database_closes(database_url: str) -> None:
    running = Running(database_url)

    async def ask_and_close() -> None:
        writes = [asyncio.create_task(running.db.write(put, f"{n}")) for n in range(20)]
        await asyncio.sleep(0)
        await running.db.close()
        running.is_closed = True
        await asyncio.gather(*writes)

    running.run(ask_and_close())
    running.close()
    again = Running(database_url)
    assert len(again.names()) == 20
    again.close()


def test_failed_statement_does_not_tell_its_parameters(running: Running) -> None:
    running.run(running.db.write(put, "a", "whsec_canary"))
    with pytest.raises(IntegrityError) as failed:
        running.run(running.db.write(put, "a", "whsec_canary"))
    assert "whsec_canary" not in str(failed.value)


# Many at once


def test_of_writes_at_once_only_the_failing_ones_callers_see_an_error(running: Running) -> None:
    def refuse(tx: Tx) -> None:
        put(tx, "refused")
        raise Refused

    def break_a_rule(tx: Tx) -> None:
        put(tx, "broken")
        tx.execute(text("INSERT INTO generated_secrets (name) VALUES ('x')"))

    results = running.together(
        lambda tx: put(tx, "a"),
        refuse,
        lambda tx: put(tx, "b"),
        break_a_rule,
        lambda tx: put(tx, "c"),
    )
    assert [type(result) for result in results] == [str, Refused, str, IntegrityError, str]
    assert running.names() == {"a", "b", "c"}


def test_a_unique_race_is_lost_by_all_but_one(running: Running) -> None:
    results = running.together(*[lambda tx, n=n: put(tx, "same", f"{n}") for n in range(8)])
    won = [result for result in results if result == "same"]
    lost = [result for result in results if isinstance(result, IntegrityError)]
    assert (len(won), len(lost)) == (1, 7)


def test_function_that_looks_before_it_inserts_wins_or_finds(running: Running) -> None:
    """A race between the look and the insert is tried again."""

    def ensure(tx: Tx) -> str:
        found = tx.execute(select(folders.c.id).where(folders.c.path == "/a")).scalar_one_or_none()
        if found is not None:
            return str(found)
        now, folder_id = tx.clock.now(), new_id()
        time.sleep(0.01)
        tx.execute(insert(folders).values(id=folder_id, path="/a", created_at=now, updated_at=now))
        return folder_id

    results = running.together(*[ensure] * 8)
    assert len(set(results)) == 1
    assert isinstance(results[0], str)


@on_postgres
def test_deadlock_is_tried_again_until_both_have_written(running: Running) -> None:
    for name in ("a", "b"):
        running.run(running.db.write(put, name, "0"))
    both_have_one = threading.Barrier(2, timeout=10)
    tries: list[str] = []

    def change(tx: Tx, first: str, second: str) -> None:
        tries.append(first)
        for position, name in enumerate((first, second)):
            tx.execute(
                update(generated_secrets)
                .where(generated_secrets.c.name == name)
                .values(value=generated_secrets.c.value + first)
            )
            if position == 0 and len(tries) <= 2:
                both_have_one.wait()

    results = running.together(lambda tx: change(tx, "a", "b"), lambda tx: change(tx, "b", "a"))
    assert results == [None, None]
    assert len(tries) == 3
    values = running.run(
        running.db.read(lambda tx: tx.execute(select(generated_secrets.c.value)).scalars().all())
    )
    assert {"".join(sorted(value)) for value in values} == {"0ab"}


@on_postgres
def test_serialization_failure_is_tried_again(running: Running) -> None:
    tries: list[int] = []

    def fail_once(tx: Tx) -> str:
        tries.append(1)
        if len(tries) == 1:
            tx.execute(text("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40001'; END $$"))
        return put(tx, "a")

    assert running.run(running.db.write(fail_once)) == "a"
    assert len(tries) == 2


@on_postgres
def test_other_errors_are_not_tried_again(running: Running) -> None:
    tries: list[int] = []

    def fail(tx: Tx) -> None:
        tries.append(1)
        tx.execute(text("SELECT 1/0"))

    with pytest.raises(Exception, match="division by zero"):
        running.run(running.db.write(fail))
    assert len(tries) == 1


@on_postgres
def test_replica_that_stands_still_with_a_lock_holds_nobody_up_for_long(running: Running) -> None:
    def show(tx: Tx, name: str) -> str:
        return str(tx.execute(text(f"SHOW {name}")).scalar_one())

    for name in ("lock_timeout", "idle_in_transaction_session_timeout"):
        assert running.run(running.db.read(show, name)) == "10s"


@on_postgres
def test_connection_that_the_server_dropped_is_replaced(running: Running) -> None:
    running.run(running.db.write(put, "a"))
    admin = create_engine(running.url, poolclass=NullPool)
    with admin.connect() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        )
    assert running.names() == {"a"}
    running.run(running.db.write(put, "b"))


# SQLite's groups of writes


@on_sqlite
def test_writes_that_wait_are_committed_together_and_nobody_is_answered_before(
    running: Running,
) -> None:
    """The second of the group looks, from another connection, for what the first has written."""
    entered, go_on = threading.Event(), threading.Event()
    answered: list[str] = []
    seen_by_last: list[Any] = []

    def hold_the_writer(tx: Tx) -> None:
        entered.set()
        assert go_on.wait(10)

    def look(tx: Tx) -> None:
        seen_by_last.append((_names_from_elsewhere(running.url), list(answered)))

    async def ask() -> None:
        first = asyncio.create_task(running.db.write(hold_the_writer))
        await asyncio.to_thread(entered.wait, 10)
        second = asyncio.create_task(running.db.write(put, "a"))
        second.add_done_callback(lambda _: answered.append("a"))
        third = asyncio.create_task(running.db.write(look))
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(first, second, third)

    running.run(ask())
    assert seen_by_last == [(set(), [])]
    assert _names_from_elsewhere(running.url) == {"a"}


def _names_from_elsewhere(url: str) -> set[str]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return set(connection.execute(select(generated_secrets.c.name)).scalars())


@on_sqlite
def test_disk_that_is_full_fails_every_write_of_the_group_and_the_next_ones_work_again(
    running: Running,
) -> None:
    def limit_pages(tx: Tx) -> None:
        pages = tx.execute(text("PRAGMA page_count")).scalar_one()
        tx.execute(text(f"PRAGMA max_page_count = {pages + 4}"))

    def unlimit_pages(tx: Tx) -> None:
        tx.execute(text("PRAGMA max_page_count = 1000000"))

    running.run(running.db.write(limit_pages))
    entered, go_on = threading.Event(), threading.Event()

    def hold_the_writer(tx: Tx) -> None:
        entered.set()
        assert go_on.wait(10)

    async def ask() -> list[Any]:
        first = asyncio.create_task(running.db.write(hold_the_writer))
        await asyncio.to_thread(entered.wait, 10)
        group = [
            asyncio.create_task(running.db.write(put, "small")),
            asyncio.create_task(running.db.write(put, "large", "x" * 1_000_000)),
            asyncio.create_task(running.db.write(put, "after")),
        ]
        await asyncio.sleep(0)
        go_on.set()
        await first
        return await asyncio.gather(*group, return_exceptions=True)

    results = running.run(ask())
    assert [type(result) for result in results] == [OperationalError] * 3
    assert "full" in str(results[0])
    assert running.names() == set()
    running.run(running.db.write(unlimit_pages))
    assert running.run(running.db.write(put, "large", "x" * 1_000_000)) == "large"


@on_sqlite
def test_commit_that_fails_fails_every_write_of_the_group(running: Running) -> None:
    def defer_a_broken_rule(tx: Tx) -> None:
        tx.execute(text("PRAGMA defer_foreign_keys = ON"))
        tx.execute(
            text(
                "INSERT INTO webhook_attempts (delivery_id, number, started_at, elapsed_ms, "
                "reply_beginning) VALUES ('none', 1, 0, 0, x'')"
            )
        )

    results = running.together(defer_a_broken_rule, lambda tx: put(tx, "a"))
    assert isinstance(results[0], IntegrityError)
    # Alone in a group of its own, or lost with the first: told truly either way.
    assert (results[1] == "a") == ("a" in running.names())
    assert running.run(running.db.write(put, "b")) == "b"


@on_sqlite
def test_sqlite_syncs_each_commit(running: Running) -> None:
    def settings(tx: Tx) -> tuple[Any, Any]:
        mode = tx.execute(text("PRAGMA journal_mode")).scalar_one()
        return mode, tx.execute(text("PRAGMA synchronous")).scalar_one()

    assert running.run(running.db.write(settings)) == ("wal", 2)


@on_sqlite
def test_write_waits_for_another_process_that_writes(running: Running) -> None:
    engine = create_engine(running.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as other:
        other.exec_driver_sql("BEGIN IMMEDIATE")

        async def ask() -> str:
            write = asyncio.create_task(running.db.write(put, "a"))
            await asyncio.sleep(0.1)
            assert not write.done()
            other.exec_driver_sql("COMMIT")
            return await write

        assert running.run(ask()) == "a"


def test_many_writes_all_land(running: Running) -> None:
    results = running.together(*[lambda tx, n=n: put(tx, f"{n}") for n in range(200)])
    assert results == [f"{n}" for n in range(200)]
    assert len(running.names()) == 200


# Times


@pytest.mark.parametrize(
    "when",
    [
        datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC),
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone(timedelta(hours=9))),
    ],
)
def test_times_keep_their_microseconds_and_come_back_as_utc(
    running: Running, when: datetime
) -> None:
    def write_and_read(tx: Tx) -> datetime | None:
        tx.execute(insert(folders).values(id="f", path="/f", created_at=when, updated_at=when))
        found: datetime | None = tx.execute(
            select(folders.c.created_at).where(folders.c.path == "/f")
        ).scalar_one()
        return found

    found = running.run(running.db.write(write_and_read))
    assert found == when
    assert found is not None
    assert found.utcoffset() == timedelta()


def test_now_is_now_and_can_be_put_off(running: Running) -> None:
    def read(tx: Tx) -> tuple[Any, ...]:
        return tuple(tx.execute(select(tx.now(), tx.now(60), tx.now(-60))).one())

    now, later, earlier = running.run(running.db.read(read))
    assert abs((now - datetime.now(UTC)).total_seconds()) < 10
    assert 59 < (later - now).total_seconds() < 61
    assert 59 < (now - earlier).total_seconds() < 61


def test_process_clock_takes_no_notice_of_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    before = clock.now()

    class Yesterday(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Yesterday":
            return cls.fromtimestamp(time.time() - 86400, tz)

    monkeypatch.setattr("app.clock.datetime", Yesterday)
    assert clock.now() >= before
    assert clock.wall() < before


# One process for each SQLite file


def test_second_process_is_refused_the_same_file_until_the_first_lets_go(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'loupe.db'}"
    first = ProcessLock(url)
    with pytest.raises(SettingsError, match="another Loupe process serves this SQLite file"):
        ProcessLock(url)
    first.release()
    ProcessLock(url).release()


def test_sqlite_is_what_opens_for_a_sqlite_url(tmp_path: Path, sqlite_template: Path) -> None:
    path = shutil.copy(sqlite_template, tmp_path / "copy.db")
    running = Running(f"sqlite:///{path}")
    assert isinstance(running.db, SqliteDatabase)
    running.close()


def test_utc_datetime_stores_null() -> None:
    assert literal(None, UtcDateTime()).type.process_result_value(None, None) is None  # type: ignore[attr-defined]


def test_name_of_sqlites_log_is_durable_before_the_first_commit(
    sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite goes on when the directory cannot be synced; then a power cut would lose commits."""
    shutil.copy(sqlite_template, tmp_path / "loupe.db")
    synced = []

    def fail(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        assert (tmp_path / "loupe.db-wal").exists()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    settings = load_settings(Settings, database_url=f"sqlite:///{tmp_path}/loupe.db")
    with pytest.raises(SettingsError, match="cannot be synced: Input/output error"):
        open_database(settings, Clock())
    assert synced == [tmp_path]
