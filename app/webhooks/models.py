"""A webhook delivery with its exact body, and the attempts made at it."""

from datetime import datetime

from sqlalchemy import ForeignKey, Index, LargeBinary, Table, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, UtcDateTime
from app.jobs import Leased

DELIVERED = "delivered"
DEAD = "dead"


class WebhookDelivery(Leased, Base):
    """id: the event id that receivers see, the same on every attempt.

    run_id: unique, so that the end of a run is told once, whoever records it.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        UniqueConstraint("run_id"),
        Index(None, "created_at", "id"),
        Index(None, "host", "created_at", "id"),
        Index(None, "status", "created_at", "id"),
        # Not partial: SQLite would rather take the index above, PostgreSQL could not take `status`
        # from it, and either would read all rows of a host to find the next host.
        Index("ix_webhook_deliveries_due", "status", "host", "lease_until", "due_at"),
        Index(
            "ix_webhook_deliveries_next_due",
            "status",
            "due_at",
            postgresql_where=text("status = 'pending' AND lease_until IS NULL"),
            sqlite_where=text("status = 'pending' AND lease_until IS NULL"),
        ),
        Index(
            "ix_webhook_deliveries_lease_owner",
            "lease_owner",
            postgresql_where=text("status = 'pending'"),
            sqlite_where=text("status = 'pending'"),
        ),
    )

    id: Mapped[str] = mapped_column(Text, primary_key=True)
    run_id: Mapped[str] = mapped_column(Text)
    url: Mapped[str] = mapped_column(Text)
    host: Mapped[str] = mapped_column(Text)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    request_id: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    first_attempt_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    finished_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class WebhookAttempt(Base):
    """status_code is null, and error says why, when no answer came."""

    __tablename__ = "webhook_attempts"

    delivery_id: Mapped[str] = mapped_column(
        ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True
    )
    number: Mapped[int] = mapped_column(primary_key=True)
    started_at: Mapped[datetime] = mapped_column(UtcDateTime)
    elapsed_ms: Mapped[int]
    status_code: Mapped[int | None]
    error: Mapped[str | None] = mapped_column(Text)
    reply_beginning: Mapped[bytes] = mapped_column(LargeBinary)


deliveries: Table = WebhookDelivery.__table__  # type: ignore[assignment]
attempts: Table = WebhookAttempt.__table__  # type: ignore[assignment]
