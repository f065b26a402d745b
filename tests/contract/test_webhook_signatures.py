"""Webhooks as Loupe really sends them pass every check that receivers are known to make."""

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from tests import pictures
from tests.conftest import Serve
from tests.emulators.receiver import Received, Receiver
from tests.emulators.vision import VisionEmulator

pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()


@pytest.fixture
def attempts(serve: Serve, vision: VisionEmulator) -> list[Received]:
    """Two attempts at one delivery: the receiver failed the first."""
    server = serve(google_auto_tagging="vision", sync_budget_seconds=0.02, webhook_secret=SECRET)
    vision.hold()
    vision.labels = [("Katze 猫", 90.0)]
    extensions = [{"name": "google-auto-tagging", "minConfidence": 0, "maxTags": 5}]
    with Receiver() as receiver:
        receiver.replies.append(503)
        answer = server.upload(
            pictures.jpeg(), extensions=json.dumps(extensions), webhookUrl=receiver.url
        )
        assert answer.json()["extensionStatus"] == {"google-auto-tagging": "pending"}
        vision.release()
        return receiver.wait_for(2)


def test_stock_standard_webhooks_verifies_every_attempt(attempts: list[Received]) -> None:
    for attempt in attempts:
        event = Webhook(SECRET).verify(attempt.body, dict(attempt.headers))
        assert event["status"] == "SUCCESS"
        assert event["fileObject"]["AITags"][0]["name"] == "Katze 猫"


def test_imagekits_reading_of_the_secret_verifies_every_attempt(attempts: list[Received]) -> None:
    key = base64.b64encode(SECRET.encode()).decode()
    for attempt in attempts:
        assert Webhook(key).verify(attempt.body, dict(attempt.headers))


def test_a_changed_body_secret_or_id_fails_the_check(attempts: list[Received]) -> None:
    body, headers = attempts[0].body, dict(attempts[0].headers)
    for secret, changed_body, changes in [
        (SECRET, body + b" ", {}),
        (SECRET, body, {"webhook-id": "evt_other"}),
        (SECRET, body, {"webhook-timestamp": str(int(headers["webhook-timestamp"]) + 1)}),
        ("whsec_" + base64.b64encode(bytes(32)).decode(), body, {}),
    ]:
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(changed_body, {**headers, **changes})


def verify_old_signature(body: bytes, header: str, secret: str) -> int:
    """As version 6 of the Node SDK does it. Returns the timestamp, in milliseconds."""
    items = dict(item.split("=") for item in header.split(","))
    mac = hmac.new(secret.encode(), f"{items['t']}.".encode() + body, hashlib.sha256)
    assert mac.hexdigest() == items["v1"]
    return int(items["t"])


def test_the_old_signature_verifies_every_attempt(attempts: list[Received]) -> None:
    for attempt in attempts:
        sent_ms = verify_old_signature(attempt.body, attempt.headers["x-ik-signature"], SECRET)
        assert abs(sent_ms / 1000 - time.time()) < 120
        assert sent_ms // 1000 == int(attempt.headers["webhook-timestamp"])


def test_an_event_keeps_its_id_and_body_and_is_signed_afresh(attempts: list[Received]) -> None:
    first, second = attempts

    def lasting(attempt: Received) -> tuple[Any, ...]:
        return attempt.headers["webhook-id"], attempt.body, attempt.headers["content-type"]

    assert lasting(first) == lasting(second)
    assert first.headers["x-ik-signature"] != second.headers["x-ik-signature"]
