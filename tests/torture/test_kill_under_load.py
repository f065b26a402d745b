"""`kill -9` under load: nothing acknowledged is lost or undone, nothing is told twice."""

import hashlib
import time
from collections import Counter
from pathlib import Path

import httpx
import orjson
from sqlalchemy import Engine, create_engine, select

from app.extensions.models import runs
from app.files.models import versions
from app.webhooks.models import deliveries
from tests import pictures
from tests.emulators.receiver import Receiver
from tests.torture.harness import (
    AUTH,
    Load,
    ServerProcess,
    both_extensions,
    new_seed,
    report,
    running,
    size,
    staged_files,
    wait_for,
)

KILLS = size(3, 50)
UPLOADS = size(30, 5000)


def test_kill_under_load_loses_nothing_and_tells_everything_once(
    tmp_path: Path, database_url: str
) -> None:
    seed = new_seed("kill under load")
    server = ServerProcess(
        tmp_path,
        database_url,
        LOUPE_SYNC_BUDGET_SECONDS="0.1",
        LOUPE_LOCAL_DELAY_SECONDS="aws-auto-tagging=0.3",
    )
    with Receiver() as receiver, running(server):
        fields = {"extensions": both_extensions(), "webhookUrl": receiver.url}
        with Load(server.url, pictures.jpeg(), fields) as load:
            for kill in range(1, KILLS + 1):
                wanted = UPLOADS * kill // KILLS
                wait_for(
                    lambda wanted=wanted: len(load.acknowledged) >= wanted,  # type: ignore[misc]
                    f"{wanted} uploads",
                    120,
                )
                time.sleep(seed.uniform(0, 0.3))
                server.kill()
                server.start()
        engine = create_engine(database_url)
        wait_for(lambda: not _unfinished(engine), "all that was due", 60)
        _check_files(server, load)
        _check_events(engine, load, receiver)
        assert not load.refused
        report(
            "kill under load",
            kills=KILLS,
            acknowledged=len(load.acknowledged),
            cut=load.cut,
            webhooks=len(receiver.requests),
        )
        engine.dispose()
        assert server.stop() == 0
    if database_url.startswith("sqlite"):  # else another replica might be writing: the sweep's job
        assert staged_files(tmp_path) == []


def _unfinished(engine: Engine) -> bool:
    with engine.connect() as connection:
        return any(
            connection.execute(
                select(table.c.id).where(table.c.status == "pending").limit(1)
            ).first()
            for table in (runs, deliveries)
        )


def _check_files(server: ServerProcess, load: Load) -> None:
    with httpx.Client(auth=AUTH, base_url=server.url, timeout=30) as client:
        for upload in load.acknowledged:
            details = client.get(f"/v1/files/{upload.file_id}/details").json()
            assert details["fileId"] == upload.file_id
            assert details["extensionStatus"] == {
                "aws-auto-tagging": "success",
                "google-auto-tagging": "success",
            }
            tags = [(tag["name"], tag["source"]) for tag in details["AITags"]]
            assert len(tags) == len(set(tags)) > 0
            content = client.get(upload.url).content
            assert hashlib.sha256(content).hexdigest() == upload.sha256


def _check_events(engine: Engine, load: Load, receiver: Receiver) -> None:
    """Every run that a response called pending was told; every event has one id and one body."""
    bodies: dict[str, set[bytes]] = {}
    for request in receiver.requests:
        bodies.setdefault(request.headers["webhook-id"], set()).add(request.body)
    assert all(len(each) == 1 for each in bodies.values())
    told = Counter(
        (request["fileObject"]["fileId"], request["service"])
        for request in (_json(next(iter(each))) for each in bodies.values())
    )
    assert set(told.values()) <= {1}
    announced = {
        (upload.file_id, extension)
        for upload in load.acknowledged
        for extension, status in upload.statuses.items()
        if status == "pending"
    }
    assert announced <= set(told)
    with engine.connect() as connection:
        blobs = connection.execute(select(versions.c.blob_key)).scalars().all()
    assert len(blobs) == len(set(blobs))


def _json(body: bytes) -> dict[str, dict[str, str]]:
    parsed: dict[str, dict[str, str]] = orjson.loads(body)
    return parsed
