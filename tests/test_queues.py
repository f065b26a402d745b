"""What `/readyz` and `/metrics` say of the queues."""

import httpx
from sqlalchemy import insert, update

from app.db import Tx
from app.extensions.models import provider_states, runs
from tests import pictures
from tests.conftest import Serve
from tests.emulators.vision import VisionEmulator

WANTED = '[{"name":"google-auto-tagging","minConfidence":1,"maxTags":3}]'


def make_overdue(tx: Tx) -> None:
    """As if nobody had taken the run for an hour, and nobody will."""
    tx.execute(update(runs).values(due_at=tx.now(-3600), lease_until=None, lease_owner=None))


def open_breaker(tx: Tx) -> None:
    tx.execute(
        insert(provider_states).values(
            extension="google-auto-tagging",
            failures_in_row=5,
            cooldown_seconds=30.0,
            opened_until=tx.now(3600),
            opened_for="provider_unavailable",
        )
    )


def test_not_ready_when_what_is_due_waits_too_long_unless_a_breaker_holds_it_back(
    serve: Serve, vision: VisionEmulator
) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=0)
    vision.fault = "hang"
    server.write(open_breaker)
    answer = server.upload(pictures.jpeg(), extensions=WANTED)
    assert answer.json()["extensionStatus"] == {"google-auto-tagging": "pending"}
    server.resources.stop_claiming()
    server.write(make_overdue)
    assert server.client.get("/readyz").status_code == 200
    server.write(lambda tx: tx.execute(update(provider_states).values(opened_until=None)) and None)
    refused = server.client.get("/readyz")
    assert refused.status_code == 503
    assert "run waits for" in refused.json()["message"]


def test_metrics_are_for_prometheus_and_name_no_secret(serve: Serve) -> None:
    server = serve()
    server.upload(pictures.jpeg())
    answer = httpx.get(f"{server.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    for name in (
        'loupe_requests_total{kind="upload",method="POST",status="200"}',
        "loupe_upload_bytes_total",
        'loupe_queue_depth{queue="delivery"} 0.0',
        'loupe_queue_oldest_due_seconds{queue="run"} 0.0',
    ):
        assert name in answer.text
    assert "private_" not in answer.text
    assert "whsec_" not in answer.text
