"""Real processes are told to end while each of the things they do is under way."""

import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import Row, create_engine, select
from sqlalchemy.pool import NullPool

from app.extensions.models import answers, runs
from app.extensions.schemas import AWS, GOOGLE
from app.webhooks.models import DELIVERED, deliveries
from tests import pictures
from tests.emulators.receiver import Line, Receiver, hang
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.s3 import S3Emulator
from tests.emulators.vision import VisionEmulator
from tests.files.helpers import RawConnection, form_body, form_part
from tests.files.support import asking, vendor_environment
from tests.test_db import on_postgres
from tests.torture.harness import AUTH, ServerProcess, WorkerProcess, wait_for

# Far beyond what any of it takes, and far below the limits that must not be what ends it.
WAIT_SECONDS = 60.0
ENDLESS_SECONDS = "500"

Start = Callable[..., ServerProcess]


@pytest.fixture
def start(
    database_url: str, tmp_path: Path, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> Iterator[Start]:
    """Starts processes, both vendors behind them; whatever hangs would hang for minutes."""
    with ExitStack() as stack:

        def start(kind: type[ServerProcess] = ServerProcess, **settings: str) -> ServerProcess:
            directory = tmp_path / kind.command
            directory.mkdir(exist_ok=True)
            process = kind(
                directory,
                database_url,
                **vendor_environment(vision, rekognition),
                **{
                    "LOUPE_STORAGE_URL": f"file://{tmp_path}/files",
                    "LOUPE_GOOGLE_AUTO_TAGGING": "vision",
                    "LOUPE_AWS_AUTO_TAGGING": "rekognition",
                    "LOUPE_PROVIDER_TIMEOUT_SECONDS": ENDLESS_SECONDS,
                    "LOUPE_UPLOAD_IDLE_SECONDS": ENDLESS_SECONDS,
                    "LOUPE_RESULT_TTL_DAYS": "0",
                    **settings,
                },
            )
            stack.callback(process.end)
            process.start()
            return process

        yield start


def rows(url: str, statement: Any) -> Sequence[Row[Any]]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        found = connection.execute(statement).all()
    engine.dispose()
    return found


def assert_ended_well(process: ServerProcess, url: str) -> None:
    """Exit status 0, nothing that looks like a mistake in the log, every lease given back."""
    assert process.process is not None
    assert process.process.wait(WAIT_SECONDS) == 0, process.log_tail()
    assert "Traceback" not in process.log.read_text(), process.log_tail()
    for table in (runs, deliveries, answers):
        assert rows(url, select(table.c.lease_owner).where(table.c.lease_owner.is_not(None))) == []


def upload(process: ServerProcess, name: str, *extensions: str, webhook: str = "") -> Any:
    answer = httpx.post(
        f"{process.url}/api/v1/files/upload",
        auth=AUTH,
        files={"file": (name, pictures.jpeg())},
        data={
            "fileName": name,
            "extensions": asking(*extensions),
            **({"webhookUrl": webhook} if webhook else {}),
        },
        timeout=WAIT_SECONDS,
    )
    assert answer.status_code in (200, 503), answer.text
    return answer.json()


def begin_upload(process: ServerProcess) -> tuple[RawConnection, bytes]:
    """A connection on which the head and half a body have been sent, and the other half."""
    body = form_body(form_part("fileName", b"slow.bin"), form_part("file", bytes(400_000), "slow"))
    connection = RawConnection(process.url)
    connection.send_upload_head(f"Content-Length: {len(body)}")
    half = len(body) // 2
    connection.send(body[:half])
    return connection, body[half:]


def idle_connection(process: ServerProcess) -> RawConnection:
    connection = RawConnection(process.url)
    connection.send_head("GET", "/healthz")
    assert connection.read_answer().status == 200
    return connection


def is_waiting_for_last_requests(process: ServerProcess) -> bool:
    return "Waiting for connections to close" in process.log.read_text()


def final(url: str) -> list[tuple[str, str]]:
    """Status of every run and delivery, by table, in the order in which they were made."""
    return [
        (table.name, row.status)
        for table in (runs, deliveries)
        for row in rows(url, select(table.c.status).order_by(table.c.created_at, table.c.id))
    ]


def test_what_can_be_finished_in_time_is_finished_and_answered(
    start: Start, database_url: str, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    server = start(
        LOUPE_SYNC_BUDGET_SECONDS="1.5",
        LOUPE_WEBHOOK_ON="all",
        LOUPE_SHUTDOWN_SECONDS=ENDLESS_SECONDS,
    )

    def when_released(line: Line) -> None:
        vision.gate.wait(WAIT_SECONDS)
        line.send_head(200, {"Content-Length": "0"})

    with Receiver() as receiver, ThreadPoolExecutor(1) as thread, ExitStack() as connections:
        vision.hold()
        receiver.reply = when_released
        upload(server, "told.jpg", AWS, webhook=receiver.url)
        receiver.wait_for(1, WAIT_SECONDS)
        straggler = upload(server, "straggler.jpg", GOOGLE, webhook=receiver.url)
        assert straggler["extensionStatus"] == {GOOGLE: "pending"}
        rekognition.hold()
        in_budget = thread.submit(upload, server, "in-budget.jpg", AWS)
        rekognition.wait_for_calls(2, timeout_seconds=WAIT_SECONDS)
        idle = connections.enter_context(idle_connection(server))
        slow, rest = begin_upload(server)
        connections.enter_context(slow)
        server.signal(signal.SIGTERM)
        wait_for(lambda: is_waiting_for_last_requests(server), "the last requests")
        server.signal(signal.SIGTERM)  # changes nothing

        assert idle.read_to_end() == b""
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port))
        slow.send(rest)
        assert slow.read_answer().status == 200
        rekognition.release()
        assert set(in_budget.result(WAIT_SECONDS)["extensionStatus"]) == {AWS}
        vision.release()
        assert_ended_well(server, database_url)
        # The straggler's own webhook has become due since: it is left to others.
        assert final(database_url) == [
            *[("extension_runs", "success")] * 3,
            ("webhook_deliveries", DELIVERED),
            ("webhook_deliveries", "pending"),
        ]
        assert len(receiver.requests) == 1


def hang_everything(
    server: ServerProcess,
    receiver: Receiver,
    vision: VisionEmulator,
    rekognition: RekognitionEmulator,
) -> None:
    """A webhook and both providers' stragglers are in flight, and nothing of it will end."""
    receiver.reply = hang()
    upload(server, "told.jpg", AWS, webhook=receiver.url)
    receiver.wait_for(1, WAIT_SECONDS)
    vision.fault = rekognition.fault = "hang"
    upload(server, "stragglers.jpg", GOOGLE, AWS, webhook=receiver.url)
    vision.wait_for_calls(1, timeout_seconds=WAIT_SECONDS)
    rekognition.wait_for_calls(2, timeout_seconds=WAIT_SECONDS)


def heal(receiver: Receiver, vision: VisionEmulator, rekognition: RekognitionEmulator) -> None:
    receiver.reply = 200
    for vendor in (vision, rekognition):
        vendor.fault = None
        vendor.release()


def test_what_cannot_be_finished_in_time_is_given_back_and_finished_after_a_restart(
    start: Start, database_url: str, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    settings = {
        "LOUPE_SYNC_BUDGET_SECONDS": "1",
        "LOUPE_WEBHOOK_ON": "all",
        "LOUPE_SHUTDOWN_SECONDS": "0.5",
    }
    server = start(**settings)
    with Receiver() as receiver, ExitStack() as connections:
        hang_everything(server, receiver, vision, rekognition)
        slow, _ = begin_upload(server)
        connections.enter_context(slow)
        connections.enter_context(idle_connection(server))
        server.signal(signal.SIGTERM)
        assert_ended_well(server, database_url)
        assert slow.read_to_end().startswith(b"HTTP/1.1 503 ")
        assert ("extension_runs", "success") in final(database_url)
        assert list((server.directory.parent / "files/staging").iterdir()) == []

        heal(receiver, vision, rekognition)
        server.start()
        wait_for(lambda: "pending" not in str(final(database_url)), "all is finished")
        server.signal(signal.SIGTERM)
        assert_ended_well(server, database_url)
        assert final(database_url) == [
            *[("extension_runs", "success")] * 3,
            *[("webhook_deliveries", DELIVERED)] * 3,
        ]
        assert len({request.headers["webhook-id"] for request in receiver.requests}) == 3


def test_request_that_waits_longer_than_a_stop_may_take_is_cut_and_its_run_given_back(
    start: Start, database_url: str, vision: VisionEmulator
) -> None:
    server = start(LOUPE_SYNC_BUDGET_SECONDS=ENDLESS_SECONDS, LOUPE_SHUTDOWN_SECONDS="0.5")
    vision.fault = "hang"
    with ThreadPoolExecutor(1) as thread:
        waiting: Future[Any] = thread.submit(upload, server, "picture.jpg", GOOGLE)
        vision.wait_for_calls(1, timeout_seconds=WAIT_SECONDS)
        server.signal(signal.SIGTERM)
        assert_ended_well(server, database_url)
        assert "shutting down" in waiting.result(WAIT_SECONDS)["message"]
    assert final(database_url) == [("extension_runs", "pending")]


def test_second_ctrl_c_ends_the_server_at_once_and_gives_back_what_it_held(
    start: Start, database_url: str, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    server = start(
        LOUPE_SYNC_BUDGET_SECONDS="0.5",
        LOUPE_WEBHOOK_ON="all",
        LOUPE_SHUTDOWN_SECONDS=ENDLESS_SECONDS,
    )
    with Receiver() as receiver:
        hang_everything(server, receiver, vision, rekognition)
        slow, _ = begin_upload(server)
        with slow:
            server.signal(signal.SIGINT)
            wait_for(lambda: is_waiting_for_last_requests(server), "the last requests")
            server.signal(signal.SIGINT)
            assert_ended_well(server, database_url)


# --- workers, which need PostgreSQL --------------------------------------------------------------


def start_with_worker(start: Start, vision: VisionEmulator, **settings: str) -> ServerProcess:
    """A worker that has taken a run which its provider will not answer for now; the server that
    answered the upload has ended."""
    server = start(LOUPE_SYNC_BUDGET_SECONDS="0", LOUPE_SHUTDOWN_SECONDS="0")
    vision.hold()
    server.signal(signal.SIGSTOP)  # so that it is not the server who takes the run
    worker = start(WorkerProcess, **settings)
    server.signal(signal.SIGCONT)
    upload(server, "picture.jpg", GOOGLE)
    server.stop()
    vision.wait_for_calls(1, timeout_seconds=WAIT_SECONDS)
    wait_for(lambda: vision.in_flight == 1, "the worker's call alone")
    return worker


@on_postgres
def test_worker_finishes_what_it_has_begun(
    start: Start, database_url: str, vision: VisionEmulator
) -> None:
    worker = start_with_worker(start, vision, LOUPE_SHUTDOWN_SECONDS=ENDLESS_SECONDS)
    worker.signal(signal.SIGTERM)
    wait_for(lambda: "finishing what is in flight" in worker.log.read_text(), "the end to begin")
    worker.signal(signal.SIGTERM)  # changes nothing
    vision.release()
    assert_ended_well(worker, database_url)
    assert final(database_url) == [("extension_runs", "success")]


@on_postgres
@pytest.mark.parametrize("how", ["its time is over", "a second Ctrl-C"])
def test_worker_gives_back_what_it_cannot_finish(
    start: Start, database_url: str, vision: VisionEmulator, how: str
) -> None:
    limit = "0.5" if how == "its time is over" else ENDLESS_SECONDS
    worker = start_with_worker(start, vision, LOUPE_SHUTDOWN_SECONDS=limit)
    worker.signal(signal.SIGINT)
    if how == "a second Ctrl-C":
        wait_for(lambda: "finishing what is in flight" in worker.log.read_text(), "the end begins")
        worker.signal(signal.SIGINT)
    assert_ended_well(worker, database_url)
    assert final(database_url) == [("extension_runs", "pending")]


# --- what cannot even be closed ------------------------------------------------------------------


def test_bucket_that_hangs_keeps_no_process_from_ending(
    start: Start, database_url: str, s3: S3Emulator
) -> None:
    server = start(
        LOUPE_STORAGE_URL=f"s3://{s3.create_bucket()}",
        AWS_ENDPOINT_URL_S3=s3.url,
        LOUPE_SHUTDOWN_SECONDS="0.5",
    )
    s3.faults["put"] = "hang"
    s3.calls.clear()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(upload, server, "picture.jpg", GOOGLE)
        s3.wait_for("put", timeout_seconds=WAIT_SECONDS)
        server.signal(signal.SIGTERM)
        assert server.process is not None
        assert server.process.wait(WAIT_SECONDS) == 1
        assert "closing took too long" in server.log_tail()
        assert "shutting down" in waiting.result(WAIT_SECONDS)["message"]
    assert final(database_url) == []


@on_postgres
def test_database_that_hangs_keeps_no_process_from_ending(start: Start, database_url: str) -> None:
    server = start(LOUPE_SHUTDOWN_SECONDS="0.5")
    with psycopg.connect(database_url.replace("+psycopg", "")) as connection:
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND pid != %s",
            [connection.info.backend_pid],
        )
        frozen = [pid for (pid,) in found]
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        server.signal(signal.SIGTERM)
        assert server.process is not None
        assert server.process.wait(WAIT_SECONDS) == 1
        assert "closing took too long" in server.log_tail()
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
