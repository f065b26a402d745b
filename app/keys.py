"""Key pairs and the webhook signing secret: from settings, or generated once and kept."""

import base64
import secrets
from dataclasses import dataclass

from sqlalchemy import Table, Text, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, Database, Tx
from app.settings import DEVELOPMENT_PRIVATE_KEY, DEVELOPMENT_PUBLIC_KEY, Settings

WEBHOOK_SECRET_PREFIX = "whsec_"  # noqa: S105


class GeneratedSecret(Base):
    __tablename__ = "generated_secrets"

    name: Mapped[str] = mapped_column(Text, primary_key=True)
    value: Mapped[str] = mapped_column(Text)


generated_secrets: Table = GeneratedSecret.__table__  # type: ignore[assignment]


@dataclass(frozen=True, slots=True)
class KeyPair:
    public: str
    private: str


@dataclass(frozen=True, slots=True)
class Keys:
    """pairs: all that are valid, so that keys can be rotated. source: where they came from."""

    pairs: tuple[KeyPair, ...]
    webhook_secret: str
    source: str
    webhook_secret_source: str


async def load_keys(db: Database, settings: Settings) -> Keys:
    """What the settings name; what they leave out is generated once and kept in the database."""
    pairs, source = await _pairs(db, settings)
    if settings.webhook_secret is not None:
        return Keys(pairs, settings.webhook_secret.get_secret_value(), source, "environment")
    secret = await db.write(kept_secret, "webhook_secret", new_webhook_secret())
    return Keys(pairs, secret, source, "generated, kept in the database")


async def _pairs(db: Database, settings: Settings) -> tuple[tuple[KeyPair, ...], str]:
    if settings.private_keys:
        both = zip(settings.public_keys, settings.private_keys, strict=True)
        pairs = tuple(KeyPair(public, private.get_secret_value()) for public, private in both)
        return pairs, "environment"
    if settings.is_loopback:
        pair = KeyPair(DEVELOPMENT_PUBLIC_KEY, DEVELOPMENT_PRIVATE_KEY)
        return (pair,), "fixed for development on loopback"
    public = await db.write(kept_secret, "public_key", f"public_{secrets.token_urlsafe(24)}")
    private = await db.write(kept_secret, "private_key", f"private_{secrets.token_urlsafe(24)}")
    return (KeyPair(public, private),), "generated, kept in the database"


def kept_secret(tx: Tx, name: str, value: str) -> str:
    """The value kept under `name`: the given one if there was none yet."""
    insert = postgresql.insert if tx.is_postgres else sqlite.insert
    tx.execute(insert(generated_secrets).values(name=name, value=value).on_conflict_do_nothing())
    kept: str = tx.execute(
        select(generated_secrets.c.value).where(generated_secrets.c.name == name)
    ).scalar_one()
    return kept


def new_webhook_secret() -> str:
    """As receivers are given it: `whsec_` and base64 of 32 random bytes."""
    return WEBHOOK_SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()
