"""Repeated uploads under one `Idempotency-Key`: the first answer again, and one file.

The key is claimed in the transaction that stores the file, so either both exist or neither.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import Table, Text, delete, insert, select, update
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, Tx, UtcDateTime, json_column
from app.errors import ApiError, BadRequest
from app.jobs import LEASE_SECONDS

KEPT_SECONDS = 24 * 3600.0
MAX_KEY_CHARACTERS = 255


class IdempotentUpload(Base):
    """answer: the body as one JSON string, as PostgreSQL would sort an object's keys; null while
    the first request runs, until `claimed_until`.

    key: digest of the API key and the client's. content: digest of the file and its fields.
    """

    __tablename__ = "idempotent_uploads"

    key: Mapped[str] = mapped_column(Text, primary_key=True)
    content: Mapped[str] = mapped_column(Text)
    file_id: Mapped[str] = mapped_column(Text)
    version_id: Mapped[str] = mapped_column(Text)
    answer: Mapped[str | None] = mapped_column(json_column())
    claimed_until: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


uploads: Table = IdempotentUpload.__table__  # type: ignore[assignment]


class OtherContent(BadRequest):
    def __init__(self) -> None:
        super().__init__(
            "Your request contains an Idempotency-Key that was used with another file or other "
            "parameters."
        )


class StillRunning(ApiError):
    def __init__(self) -> None:
        super().__init__(
            409,
            "The first request with this Idempotency-Key is still running.",
            headers={"retry-after": "1"},
        )


@dataclass(frozen=True, slots=True)
class IdempotencyKey:
    """One upload's claim. claim_seconds: how long the first request may take to answer."""

    key: str
    content: str
    claim_seconds: float


@dataclass(frozen=True, slots=True)
class Repeat:
    """An earlier upload under the same key. answer: null if its process died before answering."""

    answer: dict[str, Any] | None
    version_id: str


def idempotency_key(
    client_key: str | None,
    api_key: str,
    fields: Mapping[str, str],
    file: str,
    claim_seconds: float,
) -> IdempotencyKey | None:
    """None when the client sent no key. Raises BadRequest when it is too long.

    file: its digest, or the URL that it is to be fetched from.
    """
    if not client_key:
        return None
    if len(client_key) > MAX_KEY_CHARACTERS:
        raise BadRequest(
            f"Your request contains an Idempotency-Key of more than {MAX_KEY_CHARACTERS} "
            "characters."
        )
    parts = [file, *(part for name in sorted(fields) for part in (name, fields[name]))]
    return IdempotencyKey(
        _digest([api_key, client_key]), _digest(parts), claim_seconds + LEASE_SECONDS
    )


def _digest(parts: list[str]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode("utf-8", "surrogateescape")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def find_repeat(tx: Tx, key: IdempotencyKey) -> Repeat | None:
    """None if the key is free. Raises OtherContent, StillRunning."""
    row = tx.execute(
        select(uploads, (uploads.c.claimed_until > tx.now()).label("is_running")).where(
            uploads.c.key == key.key, uploads.c.expires_at > tx.now()
        )
    ).one_or_none()
    if row is None:
        return None
    if row.content != key.content:
        raise OtherContent
    if row.answer is None and row.is_running:
        raise StillRunning
    answer = None if row.answer is None else orjson.loads(row.answer)
    return Repeat(answer, row.version_id)


def claim_key(tx: Tx, key: IdempotencyKey, file_id: str, version_id: str) -> None:
    """In the transaction that stores the file; the caller has found no repeat in it."""
    tx.execute(delete(uploads).where(uploads.c.expires_at <= tx.now()))
    tx.execute(
        insert(uploads).values(
            key=key.key,
            content=key.content,
            file_id=file_id,
            version_id=version_id,
            claimed_until=tx.now(key.claim_seconds),
            expires_at=tx.now(KEPT_SECONDS),
        )
    )


def keep_answer(tx: Tx, key: IdempotencyKey, answer: dict[str, Any]) -> None:
    text = orjson.dumps(answer).decode()
    tx.execute(update(uploads).where(uploads.c.key == key.key).values(answer=text))
