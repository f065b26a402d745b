"""An extension run: one extension of one request, on one version of a file."""

from datetime import date, datetime
from typing import Any

from sqlalchemy import Index, Table, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, UtcDateTime, json_column
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
        Index(None, "created_at", "id"),
        Index(None, "file_id", "created_at", "id"),
        Index(None, "status", "created_at", "id"),
        Index(
            "ix_extension_runs_due",
            "extension",
            "lease_until",
            "due_at",
            postgresql_where=text("status = 'pending'"),
            sqlite_where=text("status = 'pending'"),
        ),
        Index(
            "ix_extension_runs_next_due",
            "status",
            "due_at",
            postgresql_where=text("status = 'pending' AND lease_until IS NULL"),
            sqlite_where=text("status = 'pending' AND lease_until IS NULL"),
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


class ProviderAnswer(Base):
    """A provider's whole answer to a picture, or the claim of whoever is asking for it now.

    key: provider, answer version and sha256 of the bytes sent. labels: pairs of name and
    confidence; null while the call is under way, and then the lease says for how long.
    """

    __tablename__ = "provider_answers"

    key: Mapped[str] = mapped_column(Text, primary_key=True)
    labels: Mapped[list[list[Any]] | None] = mapped_column(json_column())
    model_version: Mapped[str | None] = mapped_column(Text)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime, index=True)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    lease_owner: Mapped[str | None] = mapped_column(Text, index=True)


class ProviderState(Base):
    """What all replicas know of the provider behind an extension.

    opened_until: while the breaker is open, when the next probe may be made. opened_for: the
    reason of the failure that opened it. next_call_at: what the rate allows.
    """

    __tablename__ = "provider_states"

    extension: Mapped[str] = mapped_column(Text, primary_key=True)
    failures_in_row: Mapped[int]
    cooldown_seconds: Mapped[float]
    opened_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    opened_for: Mapped[str | None] = mapped_column(Text)
    next_call_at: Mapped[datetime | None] = mapped_column(UtcDateTime)


class ProviderSlot(Base):
    """Room for one call in flight to the provider behind an extension, over all replicas.

    lease_until: how long the call that has it can last. Background runs take the numbers below
    the half only. On SQLite, with its one process, there are none.
    """

    __tablename__ = "provider_slots"

    extension: Mapped[str] = mapped_column(Text, primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    lease_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    lease_owner: Mapped[str | None] = mapped_column(Text)


class ExtensionUsage(Base):
    """Counts of one UTC day. refused: calls that the monthly cap held back."""

    __tablename__ = "extension_usage"

    extension: Mapped[str] = mapped_column(Text, primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    calls: Mapped[int]
    reused: Mapped[int]
    refused: Mapped[int]


answers: Table = ProviderAnswer.__table__  # type: ignore[assignment]
provider_states: Table = ProviderState.__table__  # type: ignore[assignment]
slots: Table = ProviderSlot.__table__  # type: ignore[assignment]
usage: Table = ExtensionUsage.__table__  # type: ignore[assignment]
runs: Table = ExtensionRun.__table__  # type: ignore[assignment]
