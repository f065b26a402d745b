"""Slots of the calls to a provider, and indexes of runs that leave leased rows aside."""

from collections.abc import Sequence

import sqlalchemy as sa

from alembic import op
from app.db import UtcDateTime

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLE = "extension_runs"
DUE = "ix_extension_runs_due"
NEXT_DUE = "ix_extension_runs_next_due"


def _index_due_runs(columns: list[str]) -> None:
    pending = sa.text("status = 'pending'")
    op.drop_index(DUE, TABLE)
    op.create_index(DUE, TABLE, columns, postgresql_where=pending, sqlite_where=pending)


def upgrade() -> None:
    op.create_table(
        "provider_slots",
        sa.Column("extension", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("lease_until", UtcDateTime(), nullable=True),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("extension", "number", name=op.f("pk_provider_slots")),
    )
    _index_due_runs(["status", "extension", "lease_until", "due_at"])
    unleased = sa.text("status = 'pending' AND lease_until IS NULL")
    op.create_index(
        NEXT_DUE, TABLE, ["status", "due_at"], postgresql_where=unleased, sqlite_where=unleased
    )


def downgrade() -> None:
    op.drop_index(NEXT_DUE, TABLE)
    _index_due_runs(["extension", "due_at"])
    op.drop_table("provider_slots")
