"""Brings the database's schema up to date, and says whether it is."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.exc import DatabaseError, ProgrammingError

from alembic import command
from app.db import migration_engine
from app.settings import SettingsError

MIGRATIONS = Path(__file__).resolve().parent.parent / "alembic"


def upgrade(url: str) -> None:
    """Safe to run from several processes at once, and again."""
    with _connection_errors():
        command.upgrade(migration_config(url), "head")


@contextmanager
def _connection_errors() -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        if isinstance(error, ProgrammingError):
            raise  # a mistake of ours
        reason = str(error.orig).strip().splitlines()[0]
        raise SettingsError(f"LOUPE_DATABASE_URL: the database failed: {reason}") from None


def migration_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["url"] = url
    return config


def require_current(url: str) -> None:
    """Raises SettingsError when the schema is not the one that this code knows."""
    engine = migration_engine(url)
    with _connection_errors(), engine.connect() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
    engine.dispose()
    wanted = ScriptDirectory.from_config(migration_config(url)).get_current_head()
    if found != wanted:
        raise SettingsError(
            f"The database's schema is at {found or 'nothing'}, this version of Loupe needs "
            f"{wanted}: run `python -m app migrate`."
        )
