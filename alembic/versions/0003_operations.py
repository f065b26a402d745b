"""Indexes for the lists of runs and deliveries."""

from collections.abc import Sequence

from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

INDEXES = (
    ("extension_runs", ("created_at", "id")),
    ("extension_runs", ("file_id", "created_at", "id")),
    ("extension_runs", ("status", "created_at", "id")),
    ("webhook_deliveries", ("created_at", "id")),
    ("webhook_deliveries", ("host", "created_at", "id")),
    ("webhook_deliveries", ("status", "created_at", "id")),
)


def _name(table: str, columns: tuple[str, ...]) -> str:
    return "_".join(("ix", table, *columns))


def upgrade() -> None:
    for table, columns in INDEXES:
        op.create_index(_name(table, columns), table, list(columns))


def downgrade() -> None:
    for table, columns in INDEXES:
        op.drop_index(_name(table, columns), table)
