"""Provider calls (stored answers, what replicas know of a provider, counts by day), and uploads
that are repeated under one key."""

from collections.abc import Sequence

import sqlalchemy as sa

from alembic import op
from app.db import UtcDateTime, json_column

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | Sequence[str] | None = None
depends_on: str | Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "extension_usage",
        sa.Column("extension", sa.Text(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("calls", sa.Integer(), nullable=False),
        sa.Column("reused", sa.Integer(), nullable=False),
        sa.Column("refused", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("extension", "day", name=op.f("pk_extension_usage")),
    )
    op.create_table(
        "provider_answers",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("labels", json_column(), nullable=True),
        sa.Column("model_version", sa.Text(), nullable=True),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=True),
        sa.Column("lease_until", UtcDateTime(), nullable=True),
        sa.Column("lease_owner", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_provider_answers")),
    )
    op.create_index(
        "ix_provider_answers_expires_at", "provider_answers", ["expires_at"], unique=False
    )
    op.create_index(
        "ix_provider_answers_lease_owner", "provider_answers", ["lease_owner"], unique=False
    )

    op.create_table(
        "provider_states",
        sa.Column("extension", sa.Text(), nullable=False),
        sa.Column("failures_in_row", sa.Integer(), nullable=False),
        sa.Column("cooldown_seconds", sa.Double(), nullable=False),
        sa.Column("opened_until", UtcDateTime(), nullable=True),
        sa.Column("opened_for", sa.Text(), nullable=True),
        sa.Column("next_call_at", UtcDateTime(), nullable=True),
        sa.PrimaryKeyConstraint("extension", name=op.f("pk_provider_states")),
    )
    op.create_table(
        "idempotent_uploads",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("file_id", sa.Text(), nullable=False),
        sa.Column("version_id", sa.Text(), nullable=False),
        sa.Column("answer", json_column(), nullable=True),
        sa.Column("claimed_until", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotent_uploads")),
    )
    op.create_index("ix_idempotent_uploads_expires_at", "idempotent_uploads", ["expires_at"])


def downgrade() -> None:
    for table in ("idempotent_uploads", "provider_states", "provider_answers", "extension_usage"):
        op.drop_table(table)
