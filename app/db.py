"""The database: engine, naming, and the two ways to run a transaction, `read()` and `write()`.

A transaction is a plain function whose first parameter is `tx: Tx`. It commits on return and
rolls back on raise, and it cannot await, so none is ever open across a network call.

SQLite: reads run inline in the event loop (an indexed query costs less than a thread hop), long
ones in a reader thread, and writes on the one writer thread, which takes all that wait, each in
its savepoint, under one BEGIN IMMEDIATE ... COMMIT. PostgreSQL: a thread and a connection each.
"""

import asyncio
import fcntl
import os
import random
import sqlite3
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import orjson
import psycopg.errors
import structlog
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    CursorResult,
    DateTime,
    Engine,
    Executable,
    Float,
    MetaData,
    Text,
    TypeDecorator,
    create_engine,
    event,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.pool import NullPool
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import JSON

from app.clock import Clock
from app.groups import GroupQueue, Outcome
from app.settings import Settings, SettingsError

log = structlog.get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

POSTGRES_THREADS = 16
POSTGRES_OPTIONS = "-c lock_timeout=10s -c idle_in_transaction_session_timeout=10s -c timezone=UTC"
WRITE_TRIES = 8
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Errors after which SQLite's whole transaction is lost, not one statement of it.
_SQLITE_FATAL = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_INTERRUPT,
}


class Base(DeclarativeBase):
    """Declarative tables are for the schema and its migrations; queries are Core statements."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime: timestamptz on PostgreSQL, microseconds since 1970 on SQLite."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        kind = DateTime(timezone=True) if dialect.name == "postgresql" else BigInteger()
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None or dialect.name == "postgresql":
            return value
        return _microseconds(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:
        if value is None or isinstance(value, datetime):
            return value
        return _EPOCH + timedelta(microseconds=value)


def _microseconds(when: datetime) -> int:
    """Since 1970."""
    return (when - _EPOCH) // timedelta(microseconds=1)


class _NowPlus(FunctionElement[datetime]):
    type = UtcDateTime()
    inherit_cache = True


@compiles(_NowPlus, "postgresql")
def _on_postgres(element: _NowPlus, compiler: Any, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"(clock_timestamp() + make_interval(secs => {seconds}))"


@compiles(_NowPlus, "sqlite")
def _on_sqlite(element: _NowPlus, compiler: Any, **options: Any) -> str:
    return f"now_plus({compiler.process(element.clauses, **options)})"


def now_plus(seconds: float | ColumnElement[float] = 0) -> ColumnElement[datetime]:
    """So many seconds from now, for leases and due times: by the database's clock if many machines
    share it; on SQLite by the process's own, as a function that its connections have."""
    return _NowPlus(type_coerce(seconds, Float()))


def json_column() -> JSON:
    """JSON as text on SQLite, JSONB on PostgreSQL; None is SQL NULL."""
    return JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def bytewise_text() -> Text:
    """Text that sorts and compares by code point on both databases."""
    return Text().with_variant(Text(collation="C"), "postgresql")


class Tx:
    """One open transaction, handed to every transaction function as its first parameter."""

    __slots__ = ("_connection", "_driver", "clock", "dialect", "is_postgres")

    def __init__(self, connection: Connection, clock: Clock) -> None:
        self._connection = connection
        self._driver: Any = connection.connection.driver_connection
        self.clock = clock
        self.dialect = connection.dialect
        self.is_postgres = connection.dialect.name == "postgresql"

    def execute(
        self, statement: Executable, parameters: Any = None
    ) -> CursorResult[*tuple[Any, ...]]:
        return self._connection.execute(statement, parameters)

    def execute_driver(self, sql: str, arguments: Any = ()) -> Any:
        """Runs SQL without SQLAlchemy's own work, which takes longer than a short statement.

        Returns the driver's cursor. Raises what SQLAlchemy raises.
        """
        driver = self.dialect.loaded_dbapi
        try:
            return self._driver.execute(sql, arguments)
        except driver.Error as error:
            raise DBAPIError.instance(
                sql, None, error, driver.Error, hide_parameters=True, dialect=self.dialect
            ) from error

    def now(self, plus_seconds: float = 0) -> ColumnElement[datetime]:
        """`now_plus`, in a statement that is built when it runs."""
        return now_plus(plus_seconds)


class Database(ABC):
    """Where transactions run. Made by `open_database()`."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    @abstractmethod
    async def read(
        self, function: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs a short reading transaction."""

    @abstractmethod
    async def scan(
        self, function: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs a reading transaction that may take long: lists, searches, counts."""

    async def write(
        self, function: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Runs a writing transaction to its end, even when the caller is cancelled meanwhile.

        Answers after the commit. The function may run more than once, so it touches only `tx`.
        """
        return await asyncio.shield(self._submit(lambda tx: function(tx, *args, **kwargs)))

    @abstractmethod
    def _submit(self, function: Callable[[Tx], T]) -> "asyncio.Future[T]": ...

    @abstractmethod
    async def close(self) -> None: ...


_Write = Callable[[Tx], Any]


class _GroupFailed(Exception):
    """SQLite lost the whole transaction; everyone in it gets the cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(cause)
        self.cause = cause


class _Reader:
    """A connection for one reading transaction after another, which the driver begins and ends:
    around a short query, SQLAlchemy takes longer for that than for everything else.

    Belongs to the thread that makes it.
    """

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self._connection = engine.connect()
        self._driver: Any = self._connection.connection.driver_connection
        self._tx = Tx(self._connection, clock)

    def run(
        self, function: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        self._tx.execute_driver("BEGIN")
        try:
            result = function(self._tx, *args, **kwargs)
        except BaseException:
            self._connection.rollback()
            self._driver.rollback()
            raise
        # If SQLAlchemy has run a statement, it believes that it has begun the transaction.
        self._connection.commit()
        self._driver.commit()
        return result

    def close(self) -> None:
        self._connection.close()


class SqliteDatabase(Database):
    """One process, one writer thread, one reading connection in the event loop."""

    def __init__(self, url: str, clock: Clock) -> None:
        super().__init__(clock)
        self._writing = _sqlite_engine(url, clock, begin="BEGIN IMMEDIATE")
        self._reading = _sqlite_engine(url, clock)
        self._inline = _Reader(self._reading, clock)
        _make_log_durable(self._inline, url)
        self._scanner = ThreadPoolExecutor(1, thread_name_prefix="sqlite-scan")
        # Belongs to that thread, and is kept: to open one costs more than a short list.
        self._scanning: _Reader | None = None
        self._writes: GroupQueue[_Write] = GroupQueue()
        self._writer = threading.Thread(target=self._write_all, name="sqlite-write", daemon=True)
        self._writer.start()

    async def read(
        self, function: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return self._inline.run(function, *args, **kwargs)

    async def scan(
        self, function: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        def run() -> T:
            self._scanning = self._scanning or _Reader(self._reading, self.clock)
            return self._scanning.run(function, *args, **kwargs)

        return await asyncio.get_running_loop().run_in_executor(self._scanner, run)

    def _close_scanning(self) -> None:
        if self._scanning is not None:
            self._scanning.close()

    def _submit(self, function: Callable[[Tx], T]) -> "asyncio.Future[T]":
        return self._writes.submit(function)

    def _write_all(self) -> None:
        with self._writing.connect() as connection:
            for group in self._writes.groups():
                group.answer(self._commit(connection, group.jobs))

    def _commit(self, connection: Connection, group: list[_Write]) -> list[Outcome]:
        """(result, error) of each write; nobody is answered before the commit."""
        try:
            with connection.begin():
                tx = Tx(connection, self.clock)
                return [_in_savepoint(connection, tx, write) for write in group]
        except Exception as error:
            cause = error.cause if isinstance(error, _GroupFailed) else error
            log.error("database write failed", writes=len(group), exc_info=cause)
            # A failed COMMIT leaves SQLite's transaction open: it ends with its connection.
            connection.invalidate()
            return [(None, cause)] * len(group)

    async def close(self) -> None:
        self._writes.close()
        await asyncio.to_thread(self._writer.join)
        await asyncio.get_running_loop().run_in_executor(self._scanner, self._close_scanning)
        self._scanner.shutdown()
        self._inline.close()
        self._reading.dispose()
        self._writing.dispose()


def _sqlite_engine(url: str, clock: Clock, *, begin: str | None = None) -> Engine:
    """begin: how SQLAlchemy begins a transaction; null where others do."""
    engine = create_engine(url, poolclass=NullPool, **_engine_options())

    def microseconds_from_now(seconds: float) -> int:
        return _microseconds(clock.now() + timedelta(seconds=seconds))

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        for pragma in (
            "busy_timeout=10000",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")
        connection.create_function("now_plus", 1, microseconds_from_now)

    if begin is not None:

        @event.listens_for(engine, "begin")
        def say_begin(connection: Connection) -> None:
            Tx(connection, clock).execute_driver(begin)

    return engine


def _make_log_durable(reader: _Reader, url: str) -> None:
    """Makes SQLite create its log, and the log's name outlive a power cut before the first commit.

    SQLite does it too, but goes on when it fails. The log stays while the connection is open.
    Raises SettingsError.
    """
    reader.run(lambda tx: tx.execute_driver("SELECT count(*) FROM sqlite_master").fetchone())
    directory = Path(f"{make_url(url).database}").absolute().parent
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise SettingsError(
            f"LOUPE_DATABASE_URL: {directory} cannot be synced: {error.strerror}."
        ) from None
    finally:
        os.close(descriptor)


def _in_savepoint(connection: Connection, tx: Tx, function: Callable[[Tx], Any]) -> Outcome:
    """Only the caller of a failing function sees its error, unless SQLite lost everything."""
    tx.execute_driver("SAVEPOINT one_of_the_group")
    outcome: Outcome
    try:
        outcome = function(tx), None
    except Exception as error:
        if _ends_the_group(connection, error):
            raise _GroupFailed(error) from error
        tx.execute_driver("ROLLBACK TO one_of_the_group")
        outcome = None, error
    tx.execute_driver("RELEASE one_of_the_group")
    return outcome


def _ends_the_group(connection: Connection, error: Exception) -> bool:
    driver_connection = connection.connection.driver_connection
    assert isinstance(driver_connection, sqlite3.Connection)
    if not driver_connection.in_transaction:
        return True
    code = getattr(getattr(error, "orig", None), "sqlite_errorcode", None)
    return code is not None and (code & 0xFF) in _SQLITE_FATAL


class PostgresDatabase(Database):
    """Many processes; a thread and a connection for each transaction under way."""

    def __init__(self, url: str, clock: Clock) -> None:
        super().__init__(clock)
        self._engine = create_engine(
            url,
            pool_size=POSTGRES_THREADS,
            max_overflow=0,
            pool_pre_ping=True,
            connect_args={"options": POSTGRES_OPTIONS, "connect_timeout": 10},
            **_engine_options(),
        )
        # All statements of a reading transaction see the same moment, as they do on SQLite.
        self._snapshots = self._engine.execution_options(isolation_level="REPEATABLE READ")
        self._threads = ThreadPoolExecutor(POSTGRES_THREADS, thread_name_prefix="postgres")

    async def read(
        self, function: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await self._run(self._in_snapshot, lambda tx: function(tx, *args, **kwargs))

    async def scan(
        self, function: Callable[Concatenate[Tx, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await self.read(function, *args, **kwargs)

    def _submit(self, function: Callable[[Tx], T]) -> "asyncio.Future[T]":
        return self._run(self._until_no_conflict, function)

    def _run(
        self, how: Callable[[Callable[[Tx], T]], T], function: Callable[[Tx], T]
    ) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._threads, how, function)

    def _in_snapshot(self, function: Callable[[Tx], T]) -> T:
        with self._snapshots.begin() as connection:
            return function(Tx(connection, self.clock))

    def _once(self, function: Callable[[Tx], T]) -> T:
        with self._engine.begin() as connection:
            return function(Tx(connection, self.clock))

    def _until_no_conflict(self, function: Callable[[Tx], T]) -> T:
        for attempt in range(1, WRITE_TRIES + 1):
            try:
                return self._once(function)
            except DBAPIError as error:
                if attempt == WRITE_TRIES or not isinstance(error.orig, _CONFLICTS):
                    raise
                time.sleep(random.uniform(0, 0.01 * 2**attempt))  # noqa: S311
        raise AssertionError("unreachable")

    async def close(self) -> None:
        self._threads.shutdown()
        self._engine.dispose()


# A unique race among them: whoever comes second runs again and sees the first one's row.
_CONFLICTS = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.UniqueViolation,
)


def _engine_options() -> dict[str, Any]:
    """hide_parameters: errors are logged, and parameters may be secrets."""
    return {
        "hide_parameters": True,
        "json_serializer": lambda value: orjson.dumps(value).decode(),
        "json_deserializer": orjson.loads,
    }


def open_database(settings: Settings, clock: Clock) -> Database:
    url = settings.sqlalchemy_url
    return SqliteDatabase(url, clock) if is_sqlite(url) else PostgresDatabase(url, clock)


def is_sqlite(url: str) -> bool:
    return make_url(url).get_backend_name() == "sqlite"


class ProcessLock:
    """Held by the one process that may serve an SQLite file; ends with the process.

    Raises SettingsError when another process holds it.
    """

    def __init__(self, url: str) -> None:
        path = Path(f"{make_url(url).database}.lock")
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SettingsError(
                f"LOUPE_DATABASE_URL: {path} cannot be opened: {error.strerror}."
            ) from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise SettingsError(
                "LOUPE_DATABASE_URL: another Loupe process serves this SQLite file; "
                "several processes need PostgreSQL."
            ) from None

    def release(self) -> None:
        os.close(self._descriptor)


def migration_engine(url: str) -> Engine:
    """For the schema's migrations: one connection, and no deadlines for waiting on a lock."""
    if is_sqlite(url):
        return _sqlite_engine(url, Clock(), begin="BEGIN IMMEDIATE")
    return create_engine(url, poolclass=NullPool)
