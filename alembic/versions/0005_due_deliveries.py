"""Indexes that find due deliveries at the cost of their hosts, and the next one at once."""

from collections.abc import Sequence

import sqlalchemy as sa

from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None

TABLE = "webhook_deliveries"
DUE = "ix_webhook_deliveries_due"
NEXT_DUE = "ix_webhook_deliveries_next_due"


def upgrade() -> None:
    op.drop_index(DUE, TABLE)
    op.create_index(DUE, TABLE, ["status", "host", "lease_until", "due_at"])
    unleased = sa.text("status = 'pending' AND lease_until IS NULL")
    op.create_index(
        NEXT_DUE, TABLE, ["status", "due_at"], postgresql_where=unleased, sqlite_where=unleased
    )


def downgrade() -> None:
    op.drop_index(NEXT_DUE, TABLE)
    op.drop_index(DUE, TABLE)
    pending = sa.text("status = 'pending'")
    op.create_index(DUE, TABLE, ["host", "due_at"], postgresql_where=pending, sqlite_where=pending)
