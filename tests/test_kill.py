"""A real server process is killed with SIGKILL while each of the things it does is under way."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, Row, create_engine, func, select
from sqlalchemy.pool import NullPool

from app.db import is_sqlite
from app.extensions.models import runs
from app.extensions.schemas import AWS, GOOGLE
from app.files.models import files
from app.webhooks.models import deliveries
from tests import pictures
from tests.emulators.receiver import Received, Receiver, hang
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.files.support import asking, tags, vendor_environment, wait_until
from tests.server import AUTH

ROOT = Path(__file__).parent.parent
START_SECONDS = 60.0
FINISH_SECONDS = 60.0
BUDGET_SECONDS = 1.5
CAT_AND_ANIMAL = [("Cat", 98.5), ("Animal", 97.25)]


class Process:
    """`python -m app serve`, which can be killed and started again on the same port."""

    def __init__(self, environment: dict[str, str], log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.address = ("127.0.0.1", port)
        self.url = f"http://127.0.0.1:{port}"
        self._environment = {**os.environ, **environment, "LOUPE_PORT": f"{port}"}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "app", "serve"],
                env=self._environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_until(self._is_ready, "ready", START_SECONDS)

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """Returns when it and all its children are gone."""
        assert self._process is not None
        children = _children_of(self._process.pid)
        assert children, "the children that decode pictures"
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(10)
        wait_until(lambda: not any(map(_is_alive, children)), "children gone")

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(10)


def _children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


@pytest.fixture
def process(
    database_url: str, tmp_path: Path, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> Iterator[Process]:
    process = Process(
        {
            **vendor_environment(vision, rekognition),
            "LOUPE_DATA_DIR": str(tmp_path),
            "LOUPE_DATABASE_URL": database_url,
            "LOUPE_SYNC_BUDGET_SECONDS": f"{BUDGET_SECONDS}",
            "LOUPE_RESULT_TTL_DAYS": "0",
            "LOUPE_WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8",
            "LOUPE_WEBHOOK_SCHEDULE": "0,0.2,1",
        },
        tmp_path / "log",
    )
    yield process
    process.stop()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url, poolclass=NullPool)
    yield engine
    engine.dispose()


class Client:
    """Uploads files by name, whatever becomes of the answers."""

    def __init__(self, process: Process, receiver: Receiver) -> None:
        self._process = process
        self._receiver = receiver

    def upload(self, name: str, *extensions: str) -> dict[str, Any]:
        answer = httpx.post(
            f"{self._process.url}/api/v1/files/upload",
            auth=AUTH,
            files={"file": (name, pictures.jpeg())},
            data={
                "fileName": name,
                "useUniqueFileName": "false",
                "extensions": asking(*extensions),
                "webhookUrl": self._receiver.url_for(f"/{name}"),
            },
            timeout=30,
        )
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def half_an_upload(self) -> socket.socket:
        """Of which the server has the beginning of the file; the connection stays open."""
        connection = socket.create_connection(self._process.address)
        request = httpx.Request(
            "POST",
            self._process.url + "/api/v1/files/upload",
            files={"file": ("half.jpg", bytes(8_000_000))},
            data={"fileName": "half.jpg"},
        )
        body = request.read()
        credentials = next(httpx.BasicAuth(*AUTH).auth_flow(request)).headers["authorization"]
        head = (
            "POST /api/v1/files/upload HTTP/1.1\r\nHost: x\r\n"
            f"Authorization: {credentials}\r\nContent-Length: {len(body)}\r\n"
            f"Content-Type: {request.headers['content-type']}\r\n\r\n"
        )
        connection.sendall(head.encode() + body[:6_000_000])
        return connection

    def details(self, name: str) -> dict[str, Any]:
        with httpx.Client(base_url=self._process.url, auth=AUTH) as client:
            [listed] = client.get("/v1/files", params={"name": name}).json()
            found: dict[str, Any] = client.get(f"/v1/files/{listed['fileId']}/details").json()
        return found


def test_after_a_kill_every_run_and_webhook_that_was_due_is_finished_once(
    process: Process,
    engine: Engine,
    tmp_path: Path,
    vision: VisionEmulator,
    rekognition: RekognitionEmulator,
) -> None:
    process.start()
    with Receiver() as receiver, Receiver() as hanging, ThreadPoolExecutor(2) as thread:
        in_delivery = _let_webhooks_hang(Client(process, hanging), hanging, vision, engine)
        client = Client(process, receiver)
        _leave_waiting_for_a_retry(client, vision)
        vision.hold()
        answer = client.upload("straggler.jpg", GOOGLE, AWS)
        assert answer["extensionStatus"] == {GOOGLE: "pending", AWS: "success"}
        calls = len(vision.calls)
        within_budget = thread.submit(client.upload, "within.jpg", GOOGLE)
        vision.wait_for_calls(calls + 1)
        with client.half_an_upload():
            wait_until(lambda: any((tmp_path / "files/staging").glob("*/*")), "half a file staged")
            process.kill()
        with pytest.raises(httpx.TransportError):
            within_budget.result(30)
        vision.release()
        vision.wait_until_idle()
        killed_at = time.monotonic()
        process.start()
        wait_until(lambda: _is_all_final(engine), "all final", FINISH_SECONDS)
        assert time.monotonic() - killed_at < FINISH_SECONDS

        _assert_each_told_once(engine, receiver.requests + hanging.requests)
        names = [*in_delivery, "retried.jpg", "within.jpg"]
        for name in names:
            assert client.details(name)["AITags"] == tags(GOOGLE, *CAT_AND_ANIMAL)
        assert client.details("straggler.jpg")["AITags"] == (
            tags(AWS, *CAT_AND_ANIMAL) + tags(GOOGLE, *CAT_AND_ANIMAL)
        )
        assert list((tmp_path / "files/staging").glob("*/*")) == []
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(files)).scalar_one() == 8
    assert len(rekognition.calls) == 1


def test_kill_between_a_providers_answer_and_its_commit_costs_one_more_call_and_tells_once(
    process: Process, engine: Engine, vision: VisionEmulator
) -> None:
    process.start()
    with Receiver() as receiver:
        client = Client(process, receiver)
        vision.hold()
        assert client.upload("a.jpg", GOOGLE)["extensionStatus"] == {GOOGLE: "pending"}
        with _nothing_can_be_recorded(engine):
            vision.release()
            wait_until(lambda: _has_an_answer(process), "the provider's answer is here")
            process.kill()
        assert [run.status for run in _rows(engine, select(runs))] == ["pending"]
        process.start()
        receiver.wait_for(1, FINISH_SECONDS)
        wait_until(lambda: _is_all_final(engine), "all final", FINISH_SECONDS)
        assert len(vision.calls) == 2
        assert client.details("a.jpg")["AITags"] == tags(GOOGLE, *CAT_AND_ANIMAL)
        _assert_each_told_once(engine, receiver.requests)


@contextmanager
def _nothing_can_be_recorded(engine: Engine) -> Iterator[None]:
    """Another holds what the server would have to write to."""
    lock = "LOCK extension_runs IN EXCLUSIVE MODE"
    with engine.connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_sqlite(str(engine.url)) else lock)
        yield
        connection.rollback()


def _has_an_answer(process: Process) -> bool:
    metrics = httpx.get(f"{process.url}/metrics").text
    counted = 'loupe_provider_call_seconds_count{outcome="success",provider="vision"} 1.0'
    return counted in metrics


def _let_webhooks_hang(
    client: Client, hanging: Receiver, vision: VisionEmulator, engine: Engine
) -> Sequence[str]:
    """Four webhooks are on their way, and the fifth, to the same host, is recorded only."""
    hanging.replies.extend([hang()] * 4)
    names = [f"told-{number}.jpg" for number in range(5)]
    vision.fault = "unavailable"
    for name in names:
        assert client.upload(name, GOOGLE)["extensionStatus"] == {GOOGLE: "pending"}
    vision.fault = None
    wait_until(lambda: len(_rows(engine, select(deliveries))) == 5, "five results recorded")
    hanging.wait_for(4)
    return names


def _leave_waiting_for_a_retry(client: Client, vision: VisionEmulator) -> None:
    vision.faults.append("throttle")
    vision.retry_after = BUDGET_SECONDS + 3
    assert client.upload("retried.jpg", GOOGLE)["extensionStatus"] == {GOOGLE: "pending"}
    vision.retry_after = None


def _is_all_final(engine: Engine) -> bool:
    with engine.connect() as connection:
        return not any(
            connection.execute(select(func.count()).where(table.c.status == "pending")).scalar_one()
            for table in (runs, deliveries)
        )


def _assert_each_told_once(engine: Engine, requests: Sequence[Received]) -> None:
    """One event for each run that a response called pending, or that no response told of."""
    told = _rows(engine, select(deliveries))
    announced = _rows(engine, select(runs).where(runs.c.extension == GOOGLE))
    assert {run.status for run in announced} == {"success"}
    assert sorted(row.run_id for row in told) == sorted(run.id for run in announced)
    assert {row.status for row in told} == {"delivered"}
    bodies: dict[str, set[bytes]] = {}
    for request in requests:
        bodies.setdefault(request.headers["webhook-id"], set()).add(request.body)
    assert bodies == {row.id: {row.body} for row in told}


def _rows(engine: Engine, statement: Any) -> Sequence[Row[Any]]:
    with engine.connect() as connection:
        return connection.execute(statement).all()
