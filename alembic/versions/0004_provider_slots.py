"""Slots of the calls to a provider, and queues whose index leaves leased rows aside."""

from collections.abc import Sequence

import sqlalchemy as sa

from alembic import op
from app.db import UtcDateTime

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

QUEUES = {"extension_runs": "extension", "webhook_deliveries": "host"}


def _index_due_rows(table: str, columns: list[str]) -> None:
    name, pending = f"ix_{table}_due", sa.text("status = 'pending'")
    op.drop_index(name, table)
    op.create_index(name, table, columns, postgresql_where=pending, sqlite_where=pending)


def upgrade() -> None:
    op.create_table(
        "provider_slots",
        sa.Column("extension", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("lease_until", UtcDateTime(), nullable=True),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("extension", "number", name=op.f("pk_provider_slots")),
    )
    for table, column in QUEUES.items():
        _index_due_rows(table, [column, "lease_until", "due_at"])


def downgrade() -> None:
    for table, column in QUEUES.items():
        _index_due_rows(table, [column, "due_at"])
    op.drop_table("provider_slots")
