"""What `/metrics` and `/readyz` say, while all is well and while parts of it are really down."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from app import main, schema
from app.db import Tx
from app.extensions.models import runs
from app.extensions.schemas import AWS, GOOGLE
from app.images import ImagePool
from tests import pictures
from tests.conftest import Serve, start_server
from tests.emulators.receiver import Receiver
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.s3 import S3Emulator
from tests.emulators.vision import VisionEmulator
from tests.files.helpers import on_sqlite_only
from tests.files.support import PICTURE, run_of, upload, wait_for_status, wait_until
from tests.postgres import URL_VARIABLE, Postgres, running_postgres
from tests.server import EventLoop, LoupeServer

WAIT_SECONDS = 60

Sample = tuple[str, dict[str, str]]


def metrics_of(server: LoupeServer) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    """name -> labels -> value, parsed as Prometheus would."""
    answer = httpx.get(f"{server.url}/metrics", timeout=WAIT_SECONDS)
    assert answer.status_code == 200
    found: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = frozenset(sample.labels.items())
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


def value(server: LoupeServer, name: str, **labels: str) -> float:
    """0 while nothing has been counted under these labels."""
    return metrics_of(server).get(name, {}).get(frozenset(labels.items()), 0.0)


def test_uploads_runs_calls_and_deliveries_are_counted(
    serve: Serve, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    server = serve(google_auto_tagging="vision", aws_auto_tagging="rekognition", webhook_on="all")
    rekognition.fault = "image_rejected"

    def counts() -> list[float]:
        return [
            value(server, "loupe_requests_total", kind="upload", method="POST", status="200"),
            value(server, "loupe_request_seconds_count", kind="upload"),
            value(server, "loupe_upload_bytes_total"),
            value(server, "loupe_extension_attempts_total", extension=GOOGLE, outcome="succeeded"),
            value(server, "loupe_extension_attempts_total", extension=AWS, outcome="failed"),
            value(
                server, "loupe_provider_call_seconds_count", provider="vision", outcome="success"
            ),
            value(
                server,
                "loupe_provider_call_seconds_count",
                provider="rekognition",
                outcome="image_rejected",
            ),
            value(server, "loupe_webhook_attempts_total", outcome="delivered"),
        ]

    before = counts()
    with Receiver() as receiver:
        upload(server, GOOGLE, AWS, webhook_url=receiver.url)
        receiver.wait_for(2, WAIT_SECONDS)
        expected = [1, 1, len(PICTURE), 1, 1, 1, 1, 2]
        wait_until(
            lambda: [now - b for now, b in zip(counts(), before, strict=True)] == expected,
            "everything counted once",
            WAIT_SECONDS,
        )


def test_queues_and_breakers_are_shown(serve: Serve, vision: VisionEmulator) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=0)
    vision.hold()
    answer = upload(server, GOOGLE)
    vision.wait_for_calls(1)
    assert value(server, "loupe_queue_depth", queue="run") == 1
    assert value(server, "loupe_queue_oldest_due_seconds", queue="run") == 0
    vision.release()
    wait_for_status(server, answer["fileId"], GOOGLE, "success")
    assert value(server, "loupe_queue_depth", queue="run") == 0
    assert value(server, "loupe_provider_breaker_open", extension=GOOGLE) == 0
    vision.fault = "unavailable"
    for _ in range(5):
        upload(server, GOOGLE)
    wait_until(
        lambda: value(server, "loupe_provider_breaker_open", extension=GOOGLE) == 1,
        "the breaker opens",
        WAIT_SECONDS,
    )
    assert value(server, "loupe_database_up") == 1


# --- what counts as old --------------------------------------------------------------------------


def make_overdue(tx: Tx) -> None:
    tx.execute(update(runs).values(due_at=tx.now(-3600), lease_until=None, lease_owner=None))


def let_lease_run_out(tx: Tx) -> None:
    """As if whoever worked on it for an hour had died a minute ago."""
    tx.execute(update(runs).values(due_at=tx.now(-3600), lease_until=tx.now(-60), lease_owner="x"))


@pytest.mark.parametrize("change", [make_overdue, let_lease_run_out])
def test_not_ready_while_something_due_waits_for_too_long(
    serve: Serve, vision: VisionEmulator, change: Callable[[Tx], None]
) -> None:
    server = serve(google_auto_tagging="vision", sync_budget_seconds=0)
    server.resources.stop_claiming()
    upload(server, GOOGLE)
    assert server.client.get("/readyz").status_code == 200
    server.write(change)
    refused = server.client.get("/readyz")
    assert refused.status_code == 503
    assert "run waits for 3" in refused.json()["message"]
    assert value(server, "loupe_queue_oldest_due_seconds", queue="run") > 3500


def test_run_that_waits_for_next_month_is_not_old(serve: Serve, vision: VisionEmulator) -> None:
    server = serve(
        google_auto_tagging="vision", google_monthly_calls=1, ready_max_due_age_seconds=0.001
    )
    upload(server, GOOGLE)
    waiting = upload(server, GOOGLE, content=pictures.png())
    assert waiting["extensionStatus"] == {GOOGLE: "pending"}
    wait_until(
        lambda: run_of(server, waiting["fileId"]).reason == "budget", "put off", WAIT_SECONDS
    )
    assert server.client.get("/readyz").status_code == 200
    assert value(server, "loupe_queue_depth", queue="run") == 1
    assert value(server, "loupe_queue_oldest_due_seconds", queue="run") == 0


# --- without storage, without database -----------------------------------------------------------


@on_sqlite_only
def test_not_ready_while_the_storage_folder_is_gone(server: LoupeServer) -> None:
    folder = server.resources.settings.storage_dir
    shutil.move(folder, folder.with_name("elsewhere"))
    refused = server.client.get("/readyz")
    assert (refused.status_code, refused.json()["message"]) == (
        503,
        "Not ready: files cannot be stored.",
    )
    assert value(server, "loupe_database_up") == 1
    shutil.move(folder.with_name("elsewhere"), folder)
    assert server.client.get("/readyz").status_code == 200


@on_sqlite_only
@pytest.mark.parametrize("fault", ["unavailable", "hang"])
def test_not_ready_while_s3_is_down(serve: Serve, s3: S3Emulator, fault: str) -> None:
    server = serve(storage_url=f"s3://{s3.create_bucket()}")
    s3.faults["head"] = fault
    refused = server.client.get("/readyz")
    assert refused.status_code == 503
    assert "files cannot be stored" in refused.json()["message"]
    s3.faults.clear()
    assert server.client.get("/readyz").status_code == 200


@pytest.fixture
def cluster() -> Iterator[Postgres]:
    """A cluster of the test's own, which it may take down."""
    if URL_VARIABLE in os.environ:
        pytest.skip("needs a PostgreSQL server that may be stopped")
    with running_postgres() as server:
        yield server


@pytest.fixture
def alone(
    cluster: Postgres,
    tmp_path: Path,
    event_loop_thread: EventLoop,
    shared_images: ImagePool,
) -> Iterator[LoupeServer]:
    """A server on that cluster."""
    url = cluster.create("alone")
    schema.upgrade(url)
    server = start_server(event_loop_thread, shared_images, tmp_path, url)
    yield server
    server.stop()


def assert_database_is_missed(server: LoupeServer) -> None:
    refused = server.client.get("/readyz")
    assert (refused.status_code, refused.json()["message"]) == (
        503,
        "Not ready: the database does not answer.",
    )
    assert server.client.get("/healthz").status_code == 200
    found = metrics_of(server)
    assert found["loupe_database_up"] == {frozenset(): 0.0}
    assert "loupe_queue_depth" not in found
    assert "loupe_requests_total" in found


def assert_recovers(server: LoupeServer) -> None:
    wait_until(lambda: server.client.get("/readyz").status_code == 200, "ready again", WAIT_SECONDS)
    assert value(server, "loupe_database_up") == 1
    assert "loupe_queue_depth" in metrics_of(server)
    assert server.upload(PICTURE).status_code == 200


@pytest.mark.postgres
def test_while_the_database_is_down_nothing_is_ready_and_counters_are_still_shown(
    alone: LoupeServer, cluster: Postgres
) -> None:
    assert alone.upload(PICTURE).status_code == 200
    assert cluster.control is not None
    cluster.control("stop")
    try:
        assert_database_is_missed(alone)
        assert alone.upload(PICTURE).status_code == 503
    finally:
        cluster.control("restart")
    assert_recovers(alone)


@pytest.mark.postgres
def test_while_the_database_says_nothing_health_is_answered_all_the_same(
    alone: LoupeServer, cluster: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "DATABASE_SECONDS", 0.5)
    assert alone.upload(PICTURE).status_code == 200
    conninfo = cluster.url.set(drivername="postgresql", database="alone")
    with psycopg.connect(conninfo.render_as_string(hide_password=False)) as connection:
        found = connection.execute("SELECT pid FROM pg_stat_activity WHERE datname = 'alone'")
        pids = {pid for (pid,) in found} - {connection.info.backend_pid}
        postmaster = connection.execute("SELECT pg_read_file('postmaster.pid')").fetchone()
    assert postmaster is not None
    frozen = [int(postmaster[0].split()[0]), *pids]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        assert_database_is_missed(alone)
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
    assert_recovers(alone)
