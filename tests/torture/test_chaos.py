"""Providers that throttle, hang, fail and babble while a worker is killed: every run ends right."""

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pyvips
from sqlalchemy import Engine, create_engine, func, select

from app.extensions.models import runs, slots, usage
from app.extensions.schemas import AWS, GOOGLE
from app.webhooks.models import deliveries
from tests import pictures
from tests.emulators.receiver import Received, Receiver
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.script import Script
from tests.emulators.vision import VisionEmulator
from tests.files.support import vendor_environment
from tests.torture.harness import (
    AUTH,
    ServerProcess,
    WorkerProcess,
    both_extensions,
    new_seed,
    report,
    running,
    size,
    wait_for,
)

FILES = size(30, 1000)
KILL_EVERY_SECONDS = size(1, 40) / 2
KILLS_AT_MOST = size(1, 100)
TIMEOUT_SECONDS = 3
# Of a hundred calls, each a fault that passes.
FAULTS = {"throttle": 10, "hang": 5, "unavailable": 3, "server_error": 2, "garbage": 2}
LEVELS = 16


def picture(number: int) -> bytes:
    """Its colour is its number, so coarsely that it outlives a JPEG."""
    digits = (number % LEVELS, number // LEVELS % LEVELS, number // LEVELS**2)
    red, green, blue = (digit * 256 // LEVELS + 8 for digit in digits)
    return pictures.as_jpeg(pictures.plain(90, 90, (red, green, blue)))


def number_of(image: bytes) -> int:
    colour = pyvips.Image.new_from_buffer(image, "").getpoint(45, 45)
    return sum(int(value * LEVELS / 256) * LEVELS**place for place, value in enumerate(colour))


class Model:
    """What a vendor sees in a picture, and how often it fails."""

    def __init__(self, name: str, vendor: Script, generator: random.Random) -> None:
        self.name = name
        self.vendor = vendor
        self.injected: Counter[str] = Counter()
        self._generator = generator
        self._garbled: set[int] = set()
        vendor.labels_of = self.labels_of
        vendor.fault_of = self.fault_of

    def labels_of(self, image: bytes) -> list[tuple[str, float]]:
        return [(self.label(number_of(image)), 90.0), ("Colour", 75.0)]

    def label(self, number: int) -> str:
        return f"{self.name} {number}"

    def fault_of(self, image: bytes) -> str | None:
        """No picture is garbled twice: the third time in a row would be final."""
        none = 100 - sum(FAULTS.values())
        fault = self._generator.choices([None, *FAULTS], [none, *FAULTS.values()])[0]
        if fault == "garbage":
            number = number_of(image)
            if number in self._garbled:
                return None
            self._garbled.add(number)
        if fault is not None:
            self.injected[fault] += 1
        return fault


class Reaper:
    """Kills a worker again and again, and starts another."""

    def __init__(self, worker: WorkerProcess, engine: Engine) -> None:
        self._worker = worker
        self._engine = engine
        self._over = threading.Event()
        self.kills = 0
        self.in_flight_at_kills = 0

    def work(self) -> None:
        while self.kills < KILLS_AT_MOST and not self._over.wait(KILL_EVERY_SECONDS):
            self._worker.kill()
            self.kills += 1
            self.in_flight_at_kills += leased_slots(self._engine)
            self._worker.start()

    @contextmanager
    def working(self) -> Iterator[None]:
        with ThreadPoolExecutor(1) as thread:
            reaping: Future[None] = thread.submit(self.work)
            try:
                yield
            finally:
                self._over.set()
            reaping.result(90)


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.postgres
def test_every_run_ends_as_the_model_says_and_is_told_once(
    tmp_path: Path, database_url: str
) -> None:
    seed = new_seed("chaos")
    engine = create_engine(database_url)
    with ExitStack() as stack:
        receiver = stack.enter_context(Receiver())
        vision = stack.enter_context(VisionEmulator())
        rekognition = stack.enter_context(RekognitionEmulator())
        models = {GOOGLE: Model("Vision", vision, seed), AWS: Model("Amazon", rekognition, seed)}
        settings = {
            **vendor_environment(vision, rekognition),
            "LOUPE_GOOGLE_AUTO_TAGGING": "vision",
            "LOUPE_AWS_AUTO_TAGGING": "rekognition",
            "LOUPE_SYNC_BUDGET_SECONDS": "0.3",
            "LOUPE_PROVIDER_TIMEOUT_SECONDS": f"{TIMEOUT_SECONDS}",
            "LOUPE_PROVIDER_CONCURRENCY": "8",
            "LOUPE_STORAGE_URL": f"file://{tmp_path}/files",
        }
        replicas = [start(stack, ServerProcess, tmp_path / n, database_url, settings) for n in "ab"]
        worker = start(stack, WorkerProcess, tmp_path / "worker", database_url, settings)
        reaper = Reaper(worker, engine)
        started = time.monotonic()
        with reaper.working():
            answers = upload_all(replicas, receiver.url)
            wait_for(lambda: unfinished(engine) == 0, "all runs and webhooks", size(120, 1200), 0.5)
        seconds = time.monotonic() - started
        with httpx.Client(auth=AUTH, timeout=60, base_url=replicas[0].url) as client:
            for number, answer in enumerate(answers):
                check_file(client, answer["fileId"], number, models)
        events = check_events(receiver.requests, answers)
        injected = sum((model.injected for model in models.values()), Counter())
        calls = sum(len(model.vendor.calls) for model in models.values())
        units = units_used(engine)
        report(
            "chaos",
            runs=2 * FILES,
            calls=calls,
            units=units,
            injected=injected.total(),
            **injected,
            kills=reaper.kills,
            in_flight_at_kills=reaper.in_flight_at_kills,
            events=events,
            posts=len(receiver.requests),
            seconds=round(seconds),
        )
        assert 2 * FILES <= calls <= 2 * FILES + injected.total() + reaper.in_flight_at_kills
        # What was throttled gave its unit back, what a kill cut short did not.
        billed = calls - injected["throttle"]
        assert billed <= units <= billed + reaper.in_flight_at_kills
        assert reaper.kills >= 1
    engine.dispose()


def start(
    stack: ExitStack,
    kind: type[ServerProcess],
    directory: Path,
    database_url: str,
    settings: dict[str, str],
) -> Any:
    directory.mkdir()
    return stack.enter_context(running(kind(directory, database_url, **settings)))


def upload_all(replicas: list[ServerProcess], webhook_url: str) -> list[dict[str, Any]]:
    """The answers, by the number of the picture."""
    fields = {"extensions": both_extensions(min_confidence=80), "webhookUrl": webhook_url}
    with httpx.Client(auth=AUTH, timeout=60) as client, ThreadPoolExecutor(4) as threads:

        def upload(number: int) -> dict[str, Any]:
            answer = client.post(
                f"{replicas[number % 2].url}/api/v1/files/upload",
                files={"file": ("a.jpg", picture(number))},
                data={"fileName": f"{number}.jpg", **fields},
            )
            assert answer.status_code == 200, answer.text
            body: dict[str, Any] = answer.json()
            return body

        return list(threads.map(upload, range(FILES)))


def leased_slots(engine: Engine) -> int:
    """Calls that somebody has begun and not yet recorded, be it dead or alive."""
    leased = select(func.count()).where(slots.c.lease_until > func.clock_timestamp())
    with engine.connect() as connection:
        count: int = connection.execute(leased).scalar_one()
    return count


def units_used(engine: Engine) -> int:
    with engine.connect() as connection:
        units: int = connection.execute(select(func.sum(usage.c.calls))).scalar_one()
    return units


def unfinished(engine: Engine) -> int:
    with engine.connect() as connection:
        return sum(
            connection.execute(select(func.count()).where(table.c.status == "pending")).scalar_one()
            for table in (runs, deliveries)
        )


def check_file(client: httpx.Client, file_id: str, number: int, models: dict[str, Model]) -> None:
    details = client.get(f"/v1/files/{file_id}/details").json()
    assert details["extensionStatus"] == dict.fromkeys(models, "success")
    tags = {tag["source"]: tag["name"] for tag in details["AITags"]}
    assert len(details["AITags"]) == len(models)
    assert tags == {name: model.label(number) for name, model in models.items()}


def check_events(posts: list[Received], answers: list[dict[str, Any]]) -> int:
    """Each run that a response called pending was told, under one id, with one body."""
    told: dict[tuple[str, str], set[tuple[str, bytes]]] = {}
    for post in posts:
        body = post.json()
        assert body["status"] == "SUCCESS"
        event = (body["fileObject"]["fileId"], body["service"])
        told.setdefault(event, set()).add((post.headers["webhook-id"], post.body))
    assert [event for event, bodies in told.items() if len(bodies) != 1] == []
    pending = {
        (answer["fileId"], extension)
        for answer in answers
        for extension, status in answer["extensionStatus"].items()
        if status == "pending"
    }
    assert pending == set(told)
    return len(told)
