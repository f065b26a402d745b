"""Who is asking: private keys over Basic auth, client-side upload signatures (v1), tokens (v2).

Source: the contract's sections 1.1 to 1.3, on which every message here depends byte for byte.
"""

import base64
import binascii
import hashlib
import hmac
import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import jwt
from jwt.algorithms import HMACAlgorithm
from sqlalchemy import Table, Text, delete
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, Database, Tx, UtcDateTime
from app.errors import ApiError, BadRequest
from app.keys import Keys

SIGNATURE_FIELDS = ("publicKey", "token", "expire", "signature")
LONGEST_EXPIRE_SECONDS = 3600
CLOCK_SKEW_SECONDS = 300
"""How far ahead the clock of whoever signs a token (v2) may be."""
_MAX_HEADER_CHARACTERS = 4096
_MAX_TOKEN_CHARACTERS = 1000
_MAX_JWT_CHARACTERS = 128 * 1024

_INVALID_EXPIRE = (
    "Your request contains invalid expire parameter. Expire parameter should be a Unix time in "
    "less than 1 hour into the future."
)


class UploadToken(Base):
    """A token that a client-side upload has used, kept for as long as it could be used again."""

    __tablename__ = "upload_tokens"

    digest: Mapped[str] = mapped_column(Text, primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


upload_tokens: Table = UploadToken.__table__  # type: ignore[assignment]


class NoKey(ApiError):
    def __init__(self) -> None:
        super().__init__(401, "Your request does not contain private API key.")


class UnknownKey(ApiError):
    def __init__(self) -> None:
        super().__init__(403, "Your account cannot be authenticated.")


class _AnyKeyLength(HMACAlgorithm):
    """Key pairs are what the operator made them; PyJWT would warn of short ones at each token."""

    def check_key_length(self, key: bytes) -> str | None:
        return None


_JWS = jwt.PyJWS(algorithms=[])
_JWS.register_algorithm("HS256", _AnyKeyLength(HMACAlgorithm.SHA256))


class InvalidToken(BadRequest):
    def __init__(self) -> None:
        super().__init__("Your request has invalid token.")


class Authenticator:
    def __init__(self, keys: Keys, db: Database) -> None:
        self._private_digests = [_digest(pair.private) for pair in keys.pairs]
        self._private_by_public = {pair.public: pair.private for pair in keys.pairs}
        self._db = db

    def require_private_key(self, authorization: str | None) -> str:
        """The key. Raises NoKey (401) without a readable one, UnknownKey (403) with a wrong one."""
        if authorization is None or len(authorization) > _MAX_HEADER_CHARACTERS:
            raise NoKey
        scheme, _, credentials = authorization.strip().partition(" ")
        if scheme.lower() != "basic":
            raise NoKey
        credentials = credentials.strip()
        user = _basic_user(credentials)
        if self._is_private_key(credentials):  # the raw form, not base64
            return credentials
        if user is None:
            raise NoKey
        if not self._is_private_key(user):
            raise UnknownKey
        return user

    def _is_private_key(self, candidate: str) -> bool:
        """Takes the same time whichever key it is, or none."""
        digest = _digest(candidate)
        matches = [hmac.compare_digest(digest, known) for known in self._private_digests]
        return any(matches)

    async def require_upload_signature(self, fields: Mapping[str, str]) -> None:
        """Checks a client-side upload's fields and uses its token up.

        Raises NoKey (401) when there is nothing to check, else BadRequest (400).
        """
        if not any(fields.get(name) for name in SIGNATURE_FIELDS):
            raise NoKey
        for name in SIGNATURE_FIELDS:
            if not fields.get(name):
                raise BadRequest(f"Your request is missing {name} parameter.")
        private_key = self._private_by_public.get(fields["publicKey"])
        if private_key is None:
            raise BadRequest("Your request contains invalid publicKey parameter.")
        expires_at = self._checked_expire(fields["expire"])
        token = fields["token"]
        expected = upload_signature(private_key, token, fields["expire"])
        if not hmac.compare_digest(expected.encode(), fields["signature"].encode()):
            raise BadRequest("Your request contains invalid signature parameter.")
        if len(token) > _MAX_TOKEN_CHARACTERS:
            raise BadRequest("Your request contains invalid token parameter.")
        if not await self._db.write(_use_token, _digest(token).hex(), expires_at):
            raise BadRequest(
                "Your request contains a token parameter that has been used before. "
                "Every upload needs a token of its own."
            )

    async def require_upload_token(self, fields: Mapping[str, str]) -> None:
        """Checks a client-side upload's JSON web token (v2) and uses it up.

        Its payload holds every other field as a string. Raises BadRequest (400).
        """
        token = fields.get("token")
        if not token:
            raise BadRequest("Your request is missing token parameter.")
        claims = self._verified_claims(token)
        issued_at, expires_at = claims.pop("iat"), claims.pop("exp")
        now = self._db.clock.wall()
        if expires_at <= now.timestamp():
            raise BadRequest("Your request contains expired token.")
        if not 0 < expires_at - issued_at <= LONGEST_EXPIRE_SECONDS:
            raise InvalidToken
        if expires_at > now.timestamp() + LONGEST_EXPIRE_SECONDS + CLOCK_SKEW_SECONDS:
            raise InvalidToken
        if claims != {name: value for name, value in fields.items() if name != "token"}:
            raise BadRequest(
                "Your request contains invalid payload. It does not match with the payload used "
                "to generate token."
            )
        lasts = timedelta(seconds=expires_at - now.timestamp())
        # Only what is signed makes a token: its signature has many spellings that decode alike.
        signed_text = token.rpartition(".")[0]
        if not await self._db.write(_use_token, _digest(signed_text).hex(), now + lasts):
            raise InvalidToken

    def _verified_claims(self, token: str) -> dict[str, Any]:
        """Raises InvalidToken."""
        if len(token) > _MAX_JWT_CHARACTERS:
            raise InvalidToken
        try:
            key_id = _JWS.get_unverified_header(token).get("kid")
            private_key = self._private_by_public[str(key_id)]
            claims = json.loads(_JWS.decode(token, private_key, algorithms=["HS256"]))
        except (jwt.PyJWTError, KeyError, TypeError, ValueError, RecursionError):
            raise InvalidToken from None
        if not isinstance(claims, dict):
            raise InvalidToken
        for name in ("iat", "exp"):
            if isinstance(claims.get(name), bool) or not isinstance(claims.get(name), int):
                raise InvalidToken
        return claims

    def _checked_expire(self, expire: str) -> datetime:
        # No leading zero: it might be the last digit of a used token, since only the two together
        # are signed.
        if not re.fullmatch(r"[1-9][0-9]{0,11}", expire):
            raise BadRequest(_INVALID_EXPIRE)
        now = self._db.clock.wall()
        seconds_ahead = int(expire) - now.timestamp()
        if not 0 < seconds_ahead < LONGEST_EXPIRE_SECONDS:
            raise BadRequest(_INVALID_EXPIRE)
        return now + timedelta(seconds=seconds_ahead)


def upload_signature(private_key: str, token: str, expire: str) -> str:
    """Lowercase hex HMAC-SHA1 over token and expire, with nothing between them."""
    message = (token + expire).encode()
    return hmac.new(private_key.encode(), message, hashlib.sha1).hexdigest()


def _basic_user(credentials: str) -> str | None:
    """The part before the colon; any password is accepted. None when this is not Basic auth."""
    try:
        decoded = base64.b64decode(credentials, validate=True).decode()
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    user, colon, _ = decoded.partition(":")
    return user if colon and user else None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _use_token(tx: Tx, digest: str, expires_at: datetime) -> bool:
    """False if the token had been used. Also forgets tokens that expire checks refuse anyway."""
    an_hour_ago = tx.clock.wall() - timedelta(seconds=LONGEST_EXPIRE_SECONDS)
    tx.execute(delete(upload_tokens).where(upload_tokens.c.expires_at < an_hour_ago))
    insert = postgresql.insert if tx.is_postgres else sqlite.insert
    inserted = tx.execute(
        insert(upload_tokens)
        .values(digest=digest, expires_at=expires_at)
        .on_conflict_do_nothing()
        .returning(upload_tokens.c.digest)  # an insert's row count is not known on PostgreSQL
    )
    return inserted.first() is not None
