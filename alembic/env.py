"""Runs migrations in one transaction, under a lock: several replicas may start at once, and one
that is killed midway leaves nothing behind."""

from sqlalchemy import text

import app.auth
import app.extensions.models
import app.files.idempotency
import app.files.models
import app.keys
import app.webhooks.models  # noqa: F401
from alembic import context
from app.db import Base, migration_engine

_LOCK_KEY = 7_306_084_211

engine = migration_engine(context.config.attributes["url"])
with engine.connect() as connection:
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK_KEY})"))
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        transactional_ddl=True,
        render_as_batch=connection.dialect.name == "sqlite",
    )
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
engine.dispose()
