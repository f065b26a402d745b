"""An extension run: one extension of one request, on one version of a file."""

from datetime import datetime

from sqlalchemy import Index, Table, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, UtcDateTime
from app.jobs import Leased

SUCCESS = "success"
FAILED = "failed"


class ExtensionRun(Leased, Base):
    """No foreign key to the file: a run outlives it, so that its end can still be read.

    number: rises by one for each run of the same version and extension, from 1.
    announced: a response has called it pending, or it was taken over from whoever ran it first;
    only then does its end get a webhook.
    expires_at: no attempt starts later.
    garbled_replies: unreadable replies in a row.
    """

    __tablename__ = "extension_runs"
    __table_args__ = (
        UniqueConstraint("version_id", "extension", "number"),
        Index(
            "ix_extension_runs_due",
            "extension",
            "due_at",
            postgresql_where=text("status = 'pending'"),
            sqlite_where=text("status = 'pending'"),
        ),
        Index(
            "ix_extension_runs_lease_owner",
            "lease_owner",
            postgresql_where=text("status = 'pending'"),
            sqlite_where=text("status = 'pending'"),
        ),
    )

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    file_id: Mapped[str] = mapped_column(Text)
    version_id: Mapped[str] = mapped_column(Text)
    extension: Mapped[str] = mapped_column(Text)
    number: Mapped[int]
    min_confidence: Mapped[float]
    max_tags: Mapped[int]
    webhook_url: Mapped[str | None] = mapped_column(Text)
    announced: Mapped[bool] = mapped_column(default=False)
    reason: Mapped[str | None] = mapped_column(Text)
    provider: Mapped[str | None] = mapped_column(Text)
    elapsed_ms: Mapped[int | None]
    garbled_replies: Mapped[int] = mapped_column(default=0)
    request_id: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


runs: Table = ExtensionRun.__table__  # type: ignore[assignment]
