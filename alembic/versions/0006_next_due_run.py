"""The index of the next due run by its time alone: SQLite else takes it for claiming runs too, and
then reads the due runs of all extensions."""

from collections.abc import Sequence

import sqlalchemy as sa

from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLE = "extension_runs"
NEXT_DUE = "ix_extension_runs_next_due"


def _index_next_due(columns: list[str]) -> None:
    unleased = sa.text("status = 'pending' AND lease_until IS NULL")
    op.drop_index(NEXT_DUE, TABLE)
    op.create_index(NEXT_DUE, TABLE, columns, postgresql_where=unleased, sqlite_where=unleased)


def upgrade() -> None:
    _index_next_due(["due_at"])


def downgrade() -> None:
    _index_next_due(["status", "due_at"])
