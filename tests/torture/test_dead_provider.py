"""A dead provider with a long backlog: nobody notices, and it drains by itself."""

import time

from sqlalchemy import func, insert, select

from app.db import Tx
from app.extensions.models import runs
from app.extensions.schemas import AWS, GOOGLE
from tests.conftest import Serve
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.extensions.test_calls import replicas, statuses, until, upload
from tests.torture.harness import report, size

WAITING = size(200, 1000)
UPLOADS = size(10, 100)


def put_backlog(tx: Tx) -> None:
    """Runs on the version that has the only run by now."""
    run = tx.execute(select(runs).limit(1)).one()._mapping
    again = {"status": "pending", "attempts": 0, "lease_until": None, "lease_owner": None}
    rows = [
        {**run, **again, "id": f"waiting {number}", "number": number}
        for number in range(2, WAITING + 2)
    ]
    tx.execute(insert(runs), rows)


def test_backlog_of_a_dead_provider_delays_nobody_and_drains_by_itself(
    serve: Serve, database_url: str, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    servers = replicas(serve, database_url, aws_auto_tagging="rekognition", sync_budget_seconds=60)
    vision.fault = "unavailable"
    upload(servers[0])
    servers[0].write(put_backlog)
    vision.wait_for_calls(5, timeout_seconds=60)
    started, called = time.monotonic(), len(vision.calls)
    for number in range(UPLOADS):
        told = upload(servers[number % len(servers)], number + 1, GOOGLE, AWS)
        assert told["extensionStatus"] == {GOOGLE: "pending", AWS: "success"}
    seconds = time.monotonic() - started
    failed = len(vision.calls) - called
    # Those under way when the breaker opened, then a probe at most every two seconds.
    assert failed <= 16 + seconds / 2
    attempts = select(func.sum(runs.c.attempts)).where(runs.c.status == "pending")
    assert servers[0].rows(attempts)[0][0] <= len(vision.calls) + 16
    vision.fault = None
    until(lambda: statuses(servers[0]) == {"success"}, timeout_seconds=600)
    assert len(rekognition.calls) == UPLOADS
    report(
        "dead provider",
        waiting=WAITING,
        uploads=UPLOADS,
        calls_while_dead=failed,
        upload_seconds=round(seconds / UPLOADS, 3),
        drain_seconds=round(time.monotonic() - started - seconds),
    )
