"""Migrations, on both databases: they make what the models say, once, whoever runs them."""

import multiprocessing
import shutil
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.pool import NullPool

import app.auth
import app.extensions.models
import app.files.models
import app.keys
import app.webhooks.models  # noqa: F401
from alembic import command
from app import schema
from app.db import Base, migration_engine
from app.settings import SettingsError
from tests.files.support import ENGINES
from tests.postgres import Postgres


@pytest.fixture(params=ENGINES)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any table, on each engine."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'loupe.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = f"test-{uuid4()}"
    yield server.create(name)
    server.drop(name)


def tables(url: str) -> set[str]:
    engine = create_engine(url, poolclass=NullPool)
    return set(inspect(engine).get_table_names())


def execute(url: str, statement: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text(statement))


def test_migrated_schema_is_that_of_the_models(empty_url: str) -> None:
    schema.upgrade(empty_url)
    engine = migration_engine(empty_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "compare_server_default": True}
        )
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_migrated_indexes_are_partial_as_in_the_models(empty_url: str) -> None:
    """Which the comparison does not look at."""
    schema.upgrade(empty_url)
    engine = create_engine(empty_url, poolclass=NullPool)
    pending = {
        "extension_runs": ("due", "next_due", "lease_owner"),
        "webhook_deliveries": ("next_due", "lease_owner"),
    }
    for table, names in pending.items():
        conditions: dict[str | None, Any] = {
            index["name"]: index.get("dialect_options", {}).get(f"{engine.dialect.name}_where")
            for index in inspect(engine).get_indexes(table)
        }
        for name in names:
            assert "pending" in str(conditions[f"ix_{table}_{name}"])


def test_upgrade_again_changes_nothing(empty_url: str) -> None:
    schema.upgrade(empty_url)
    execute(empty_url, "INSERT INTO generated_secrets (name, value) VALUES ('a', 'b')")
    before = tables(empty_url)
    schema.upgrade(empty_url)
    assert tables(empty_url) == before
    schema.require_current(empty_url)


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """What a migration imports is imported once, for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["app.auth", "app.files.models", "app.webhooks.models"])
    return context


def test_several_processes_at_once_upgrade_once(empty_url: str, processes: BaseContext) -> None:
    with processes.Pool(4) as pool:
        pool.map(schema.upgrade, [empty_url] * 8, chunksize=1)
        pool.close()
        pool.join()
    schema.require_current(empty_url)


def test_upgrade_that_fails_midway_leaves_nothing_and_can_be_run_again(empty_url: str) -> None:
    execute(empty_url, "CREATE TABLE webhook_attempts (in_the_way INTEGER)")
    with pytest.raises(Exception, match="already exists"):
        schema.upgrade(empty_url)
    assert tables(empty_url) <= {"webhook_attempts", "alembic_version"}
    execute(empty_url, "DROP TABLE webhook_attempts")
    schema.upgrade(empty_url)
    schema.require_current(empty_url)


_DIES_AT = """
import os, sys
from sqlalchemy import Connection, event
from sqlalchemy.engine import Engine
from app import schema

@event.listens_for(Engine, "after_cursor_execute")
def die(connection, cursor, statement, *_):
    if sys.argv[2] in statement:
        os.kill(os.getpid(), 9)

schema.upgrade(sys.argv[1])
"""


def upgrade_and_die(url: str, statement: str) -> None:
    """The upgrade's process ends at once after this statement, and before its COMMIT."""
    dying = [sys.executable, "-c", _DIES_AT, url, statement]
    assert subprocess.run(dying, timeout=60, check=False).returncode == -9


@pytest.mark.parametrize("statement", ["INSERT INTO alembic_version", "UPDATE alembic_version"])
def test_upgrade_that_is_killed_midway_leaves_nothing_and_can_be_run_again(
    empty_url: str, statement: str
) -> None:
    """After the first migration, and after the second."""
    upgrade_and_die(empty_url, statement)
    assert tables(empty_url) == set()
    schema.upgrade(empty_url)
    schema.require_current(empty_url)


def test_upgrade_of_a_schema_in_use_that_is_killed_midway_keeps_it_as_it_was(
    empty_url: str, processes: BaseContext
) -> None:
    command.upgrade(schema.migration_config(empty_url), "0001")
    execute(empty_url, "INSERT INTO generated_secrets (name, value) VALUES ('a', 'kept')")
    before = tables(empty_url)
    upgrade_and_die(empty_url, "UPDATE alembic_version")
    assert tables(empty_url) == before
    with pytest.raises(SettingsError, match="is at 0001"):
        schema.require_current(empty_url)
    with processes.Pool(3) as pool:
        pool.map(schema.upgrade, [empty_url] * 3, chunksize=1)
        pool.close()
        pool.join()
    schema.require_current(empty_url)
    engine = create_engine(empty_url, poolclass=NullPool)
    with engine.connect() as connection:
        kept = connection.execute(text("SELECT value FROM generated_secrets")).scalars().all()
    assert kept == ["kept"]


def test_schema_that_is_not_there_stops_the_start_in_one_sentence(empty_url: str) -> None:
    with pytest.raises(SettingsError, match=r"is at nothing, .*: run `python -m app migrate`\.$"):
        schema.require_current(empty_url)


def test_schema_of_another_version_stops_the_start(empty_url: str) -> None:
    schema.upgrade(empty_url)
    execute(empty_url, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SettingsError, match="is at 9999"):
        schema.require_current(empty_url)


@pytest.mark.parametrize("function", [schema.upgrade, schema.require_current])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://nobody:canary@127.0.0.1:1/none",
        "sqlite:////nowhere/at/all/loupe.db",
    ],
)
def test_database_that_cannot_be_reached_is_told_in_one_sentence(function: Any, url: str) -> None:
    with pytest.raises(SettingsError) as failed:
        function(url)
    assert str(failed.value).startswith("LOUPE_DATABASE_URL: the database failed: ")
    assert "\n" not in str(failed.value)
    assert "canary" not in str(failed.value)


def test_file_that_is_no_database_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "loupe.db"
    path.write_bytes(b"no database at all, but long enough to be looked at" * 20)
    for function in (schema.upgrade, schema.require_current):
        with pytest.raises(SettingsError, match="LOUPE_DATABASE_URL: "):
            function(f"sqlite:///{path}")


def test_template_of_the_tests_is_current(sqlite_template: Path, tmp_path: Path) -> None:
    path = shutil.copy(sqlite_template, tmp_path / "copy.db")
    schema.require_current(f"sqlite:///{path}")
