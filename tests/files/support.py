"""What tests of tagging have in common: ways to ask for it, and ways to wait for its end."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import Row, delete, func, select, update

from app.clock import Clock
from app.db import Tx
from app.extensions.models import provider_states, runs
from app.extensions.schemas import AWS, GOOGLE
from app.webhooks.models import attempts, deliveries
from tests import pictures
from tests.canaries import AWS_SECRET_KEY
from tests.conftest import start_server
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.postgres import Postgres
from tests.server import LoupeServer

T = TypeVar("T")
Way = Literal["upload", "update"]

ENGINES = ["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]
PICTURE = pictures.jpeg()
LONG_SECONDS = 30.0
"""A budget that no test uses up: what is answered is answered within it."""
SHORT_SECONDS = 0.25
"""A budget that a call begins within, and that is over soon."""


@dataclass(frozen=True, slots=True)
class Vendor:
    """An extension, the emulator behind it, and the setting that puts it there."""

    extension: str
    emulator: VisionEmulator | RekognitionEmulator
    setting: dict[str, str]


class Stand:
    """Emulated vendors, and servers that call them, which many tests share: starting a server
    takes longer than most tests. A server for each set of settings, on a database of its own.
    """

    def __init__(self, request: pytest.FixtureRequest, stack: ExitStack) -> None:
        self.engine: str = request.param
        self._request = request
        self._stack = stack
        self._servers: dict[str, LoupeServer] = {}
        self.vision = stack.enter_context(VisionEmulator())
        self.rekognition = stack.enter_context(RekognitionEmulator())

    def vendor(self, extension: str) -> Vendor:
        if extension == GOOGLE:
            return Vendor(GOOGLE, self.vision, {"google_auto_tagging": "vision"})
        return Vendor(AWS, self.rekognition, {"aws_auto_tagging": "rekognition"})

    @property
    def patient(self) -> LoupeServer:
        return self.server(sync_budget_seconds=LONG_SECONDS)

    @property
    def hasty(self) -> LoupeServer:
        return self.server(sync_budget_seconds=SHORT_SECONDS)

    @property
    def talkative(self) -> LoupeServer:
        return self.server(sync_budget_seconds=LONG_SECONDS, webhook_on="all")

    def server(self, **settings: Any) -> LoupeServer:
        key = repr(sorted(settings.items()))
        if key not in self._servers:
            self._servers[key] = self._start(settings)
        return self._servers[key]

    def _start(self, overrides: dict[str, Any]) -> LoupeServer:
        fixture = self._request.getfixturevalue
        directory: Path = fixture("tmp_path_factory").mktemp("stand")
        with pytest.MonkeyPatch.context() as environment:
            set_vendors(environment, self.vision, self.rekognition)
            server = start_server(
                fixture("event_loop_thread"),
                fixture("shared_images"),
                directory,
                self._database(directory),
                **{
                    "google_auto_tagging": "vision",
                    "aws_auto_tagging": "rekognition",
                    **overrides,
                },
            )
        self._stack.callback(server.stop)
        return server

    def _database(self, directory: Path) -> str:
        if self.engine == "sqlite":
            shutil.copy(self._request.getfixturevalue("sqlite_template"), directory / "loupe.db")
            return f"sqlite:///{directory / 'loupe.db'}"
        postgres: Postgres = self._request.getfixturevalue("postgres")
        name = f"test-{uuid4()}"
        url = postgres.create(name, template=f"template-{os.getpid()}")
        self._stack.callback(postgres.drop, name)
        return url

    def reset(self) -> None:
        """As if nothing had been, for the next test."""
        for server in self._servers.values():
            server.write(_end_all)
        for emulator in (self.vision, self.rekognition):
            emulator.faults.clear()
            emulator.fault = emulator.retry_after = emulator.reply = None
            emulator.delay_seconds = 0
            emulator.release()
            emulator.wait_until_idle()
            emulator.labels = [("Cat", 98.5), ("Animal", 97.25)]
            emulator.calls.clear()
            emulator.max_in_flight = 0


def _end_all(tx: Tx) -> None:
    for table in (runs, deliveries):
        tx.execute(update(table).where(table.c.status == "pending").values(status="ended"))
    tx.execute(delete(provider_states))


@contextmanager
def standing(request: pytest.FixtureRequest) -> Iterator[Stand]:
    with ExitStack() as stack:
        yield Stand(request, stack)


def set_vendors(
    environment: pytest.MonkeyPatch, vision: VisionEmulator, rekognition: RekognitionEmulator
) -> None:
    """What a server that starts now takes for the vendors."""
    for name, value in vendor_environment(vision, rekognition).items():
        environment.setenv(name, value)


def vendor_environment(vision: VisionEmulator, rekognition: RekognitionEmulator) -> dict[str, str]:
    return {
        "LOUPE_VISION_ENDPOINT": vision.endpoint,
        "LOUPE_VISION_INSECURE": "true",
        "AWS_ENDPOINT_URL_REKOGNITION": rekognition.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": AWS_SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def asking(*extensions: str, min_confidence: float = 0, max_tags: int = 30) -> str:
    """The `extensions` field."""
    return json.dumps(
        [
            {"name": name, "minConfidence": min_confidence, "maxTags": max_tags}
            for name in extensions
        ]
    )


def upload(
    server: LoupeServer,
    *extensions: str,
    content: bytes = PICTURE,
    name: str = "picture.jpg",
    webhook_url: str | None = None,
    **fields: str,
) -> dict[str, Any]:
    """The answer to an upload that has to succeed."""
    if extensions:
        fields.setdefault("extensions", asking(*extensions))
    if webhook_url is not None:
        fields["webhookUrl"] = webhook_url
    return answer_of(server.upload(content, name, **fields))


def patch(
    server: LoupeServer,
    file_id: str,
    *extensions: str,
    webhook_url: str | None = None,
    **body: Any,
) -> dict[str, Any]:
    """The answer to an update that has to succeed."""
    if extensions:
        body.setdefault("extensions", json.loads(asking(*extensions)))
    if webhook_url is not None:
        body["webhookUrl"] = webhook_url
    return answer_of(server.client.patch(f"/v1/files/{file_id}/details", json=body))


def ask_by(
    way: Way,
    server: LoupeServer,
    *extensions: str,
    content: bytes = PICTURE,
    webhook_url: str | None = None,
) -> dict[str, Any]:
    """The answer to an upload, or to an update of a file that was uploaded before."""
    if way == "upload":
        return upload(server, *extensions, content=content, webhook_url=webhook_url)
    file_id = upload(server, content=content)["fileId"]
    return patch(server, file_id, *extensions, webhook_url=webhook_url)


def overwrite(server: LoupeServer, answer: dict[str, Any], **fields: str) -> dict[str, Any]:
    """A new version of the file of an earlier answer."""
    return answer_of(
        server.upload(pictures.png(), answer["name"], **{"useUniqueFileName": "false", **fields})
    )


def answer_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def tags(source: str, *named: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"name": name, "confidence": c, "source": source} for name, c in named]


def wait_until(condition: Callable[[], T], what: str, timeout_seconds: float = 10) -> T:
    """The first true thing that `condition` returns. AssertionError without one in time."""
    deadline = time.monotonic() + timeout_seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not in {timeout_seconds} s: {what}"
        time.sleep(0.01)
    return result


def wait_for_status(
    server: LoupeServer, file_id: str, extension: str, status: str
) -> dict[str, Any]:
    """The file's details once its latest run of an extension has this status."""

    def details() -> dict[str, Any] | None:
        found = server.details(file_id)
        return found if found["extensionStatus"][extension] == status else None

    found = wait_until(details, f"{extension} {status}")
    assert found is not None
    return found


def runs_of(server: LoupeServer, file_id: str) -> Sequence[Row[Any]]:
    return server.rows(select(runs).where(runs.c.file_id == file_id).order_by(runs.c.id))


def run_of(server: LoupeServer, file_id: str) -> Row[Any]:
    """The only run of a file."""
    [run] = runs_of(server, file_id)
    return run


def deliveries_of(server: LoupeServer, file_id: str) -> Sequence[Row[Any]]:
    of_file = deliveries.c.run_id.in_(select(runs.c.id).where(runs.c.file_id == file_id))
    return server.rows(select(deliveries).where(of_file).order_by(deliveries.c.id))


def all_runs(server: LoupeServer) -> Sequence[Row[Any]]:
    return server.rows(select(runs).order_by(runs.c.created_at, runs.c.id))


def all_deliveries(server: LoupeServer) -> Sequence[Row[Any]]:
    return server.rows(select(deliveries).order_by(deliveries.c.created_at, deliveries.c.id))


def all_attempts(server: LoupeServer) -> Sequence[Row[Any]]:
    return server.rows(select(attempts).order_by(attempts.c.delivery_id, attempts.c.number))


def wait_until_final(server: LoupeServer, timeout_seconds: float = 20) -> None:
    """Returns when no run and no delivery is pending."""

    def left(tx: Tx) -> int:
        return sum(
            tx.execute(select(func.count()).where(table.c.status == "pending")).scalar_one()
            for table in (runs, deliveries)
        )

    wait_until(
        lambda: not server.run(server.resources.db.read(left)), "nothing pending", timeout_seconds
    )


def make_due(server: LoupeServer) -> None:
    """Whatever waits for its next attempt need not wait any longer."""

    def change(tx: Tx) -> None:
        for table in (runs, deliveries):
            waiting = (table.c.status == "pending", table.c.lease_until.is_(None))
            tx.execute(update(table).where(*waiting).values(due_at=tx.now(-1)))

    server.write(change)
    wake(server)


def wake(server: LoupeServer) -> None:
    """Both loops look again now, and not with their next poll."""

    async def in_its_loop() -> None:
        server.resources.tagging.on_due_run()
        server.resources.tagging.on_delivery()

    server.run(in_its_loop())


class SetClock(Clock):
    """A clock that a test puts forward."""

    def __init__(self) -> None:
        super().__init__()
        self._ahead = timedelta()

    def now(self) -> datetime:
        return super().now() + self._ahead

    def forward(self, **by: float) -> None:
        self._ahead += timedelta(**by)
