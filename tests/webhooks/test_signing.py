"""Deliveries are checked here by the verifiers that receivers really run."""

import base64
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta, timezone

import pytest
import standardwebhooks
from imagekitio import ImageKit

from app.keys import new_webhook_secret
from app.webhooks.signing import signature_headers

BODY = json.dumps(
    {"service": "google-auto-tagging", "status": "SUCCESS", "fileObject": {"name": "Bücher.jpg"}},
    ensure_ascii=False,
).encode()
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


def signed(body: bytes = BODY, secret: str = SECRET, now: datetime | None = None) -> dict[str, str]:
    return signature_headers(secret, "evt_1", body, now or datetime.now(UTC))


def unwrap_with_sdk(body: bytes, headers: dict[str, str], secret: str = SECRET) -> None:
    client = ImageKit(private_key="private", webhook_secret=secret)
    client.webhooks.unwrap(body.decode(), headers=headers)


def verify_as_node_6(body: bytes, header: str, secret: str) -> tuple[int, dict[str, object]]:
    """What the older Node SDK's verifyWebhookEvent does, in its order and with its texts."""
    fields = dict(part.split("=") for part in header.split(","))
    if not fields.get("v1"):
        raise ValueError("Signature missing")
    if not fields.get("t"):
        raise ValueError("Timestamp missing")
    timestamp_ms = int(fields["t"])
    if timestamp_ms < 0:
        raise ValueError("Timestamp invalid")
    message = f"{timestamp_ms}.{body.decode()}".encode()
    if fields["v1"] != hmac.new(secret.encode(), message, hashlib.sha256).hexdigest():
        raise ValueError("Incorrect signature")
    return timestamp_ms, json.loads(body)


def test_current_sdk_accepts_a_delivery() -> None:
    unwrap_with_sdk(BODY, signed())


def test_current_sdk_refuses_a_changed_body() -> None:
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        unwrap_with_sdk(BODY.replace(b"SUCCESS", b"FAILURE"), signed())


def test_current_sdk_refuses_another_secret() -> None:
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        unwrap_with_sdk(BODY, signed(), new_webhook_secret())


def test_stock_standard_webhooks_library_accepts_a_delivery() -> None:
    assert standardwebhooks.Webhook(SECRET).verify(BODY, signed()) == json.loads(BODY)


def test_stock_standard_webhooks_library_refuses_another_event_id() -> None:
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(SECRET).verify(BODY, signed() | {"webhook-id": "evt_2"})


def test_older_sdk_accepts_a_delivery() -> None:
    now = datetime(2026, 3, 1, 12, 0, 0, 123_999, tzinfo=UTC)
    timestamp_ms, event = verify_as_node_6(BODY, signed(now=now)["x-ik-signature"], SECRET)
    assert timestamp_ms == 1_772_366_400_123
    assert event == json.loads(BODY)


def test_older_sdk_refuses_a_changed_body() -> None:
    with pytest.raises(ValueError, match="Incorrect signature"):
        verify_as_node_6(BODY + b" ", signed()["x-ik-signature"], SECRET)


@pytest.mark.parametrize("body", [b"{}", b"", b'{"name": "\xf0\x9f\x98\x80 \xe2\x80\xae"}'])
def test_any_body_is_signed_byte_for_byte(body: bytes) -> None:
    headers = signed(body)
    standardwebhooks.Webhook(SECRET).verify(body, headers, json_parse=False)


def test_signatures_are_the_documented_ones() -> None:
    """Worked by hand from the two schemes' descriptions."""
    now = datetime(2026, 3, 1, 12, 0, 0, 500_000, tzinfo=UTC)
    headers = signature_headers("whsec_c2VjcmV0", "evt_1", b"{}", now)

    def mac(key: bytes, message: bytes) -> bytes:
        return hmac.new(key, message, hashlib.sha256).digest()

    whole = mac(b"whsec_c2VjcmV0", b"evt_1.1772366400.{}")
    decoded = mac(b"secret", b"evt_1.1772366400.{}")
    old = mac(b"whsec_c2VjcmV0", b"1772366400500.{}")
    assert headers == {
        "x-ik-signature": f"t=1772366400500,v1={old.hex()}",
        "webhook-id": "evt_1",
        "webhook-timestamp": "1772366400",
        "webhook-signature": (
            f"v1,{base64.b64encode(whole).decode()} v1,{base64.b64encode(decoded).decode()}"
        ),
    }


def test_each_attempt_has_a_fresh_signature_under_the_same_id() -> None:
    now = datetime.now(UTC)
    first, second = signed(now=now), signed(now=now + timedelta(seconds=5))
    assert first["webhook-id"] == second["webhook-id"]
    for name in ("x-ik-signature", "webhook-timestamp", "webhook-signature"):
        assert first[name] != second[name]


def test_time_zone_of_the_clock_does_not_matter() -> None:
    now = datetime.now(UTC)
    elsewhere = now.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert signed(now=now) == signed(now=elsewhere)


def test_naive_time_is_refused() -> None:
    with pytest.raises(TypeError):
        signed(now=datetime(2026, 3, 1))


@pytest.mark.parametrize("secret", ["whsec_not base64!", "whsec_", "whsec_a", "plain text", "ü"])
def test_secret_that_is_no_base64_is_signed_in_imagekits_reading_only(secret: str) -> None:
    headers = signed(secret=secret)
    assert len(headers["webhook-signature"].split(" ")) == 1
    unwrap_with_sdk(BODY, headers, secret)
    verify_as_node_6(BODY, headers["x-ik-signature"], secret)


@pytest.mark.parametrize("secret", ["whsec_c2VjcmV0LTE", "c2VjcmV0LTE=", "c2VjcmV0LTE"])
def test_secret_without_padding_or_prefix_passes_both_libraries(secret: str) -> None:
    headers = signed(secret=secret)
    standardwebhooks.Webhook(secret).verify(BODY, headers)
    unwrap_with_sdk(BODY, headers, secret)


def test_new_secrets_are_32_random_bytes_after_the_prefix() -> None:
    secrets = {new_webhook_secret() for _ in range(20)}
    assert len(secrets) == 20
    for secret in secrets:
        assert secret.startswith("whsec_")
        assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32
        headers = signed(secret=secret)
        unwrap_with_sdk(BODY, headers, secret)
        standardwebhooks.Webhook(secret).verify(BODY, headers)
