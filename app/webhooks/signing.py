"""Signatures of webhook deliveries, in every scheme that ImageKit's receivers check.

Sources: ImageKit's webhook guide (`x-ik-signature`); the Standard Webhooks specification and the
reading of it in ImageKit's current SDKs (`webhook-*`).
"""

import base64
import binascii
import hashlib
import hmac
from datetime import UTC, datetime, timedelta

from app.keys import WEBHOOK_SECRET_PREFIX

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def signature_headers(secret: str, event_id: str, body: bytes, now: datetime) -> dict[str, str]:
    """The headers that let a receiver check one attempt to deliver `body`.

    event_id: the same for every attempt, so that receivers can drop repeats. now: aware, wall
    clock; receivers refuse one that is five minutes off. Signs the very bytes that are sent.
    """
    timestamp_ms = (now - _EPOCH) // timedelta(milliseconds=1)
    timestamp_seconds = timestamp_ms // 1000
    signed = f"{event_id}.{timestamp_seconds}.".encode() + body
    old_mac = _mac(secret.encode(), f"{timestamp_ms}.".encode() + body)
    return {
        "x-ik-signature": f"t={timestamp_ms},v1={old_mac.hex()}",
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp_seconds),
        "webhook-signature": " ".join(
            f"v1,{base64.b64encode(_mac(key, signed)).decode('ascii')}" for key in _keys(secret)
        ),
    }


def _keys(secret: str) -> list[bytes]:
    """The keys behind a secret: ImageKit's SDKs take the whole text, prefix included; the
    specification takes what the part after the prefix decodes to, if it is base64 at all.
    """
    keys = [secret.encode()]
    encoded = secret.removeprefix(WEBHOOK_SECRET_PREFIX)
    try:
        decoded = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        return keys
    return [*keys, decoded] if decoded else keys


def _mac(key: bytes, message: bytes) -> bytes:
    return hmac.digest(key, message, hashlib.sha256)
