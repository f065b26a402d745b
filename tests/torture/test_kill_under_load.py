"""`kill -9` under load: nothing acknowledged is lost or undone, nothing is told twice."""

import hashlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import orjson
from sqlalchemy import Engine, create_engine, select

from app.extensions.models import runs
from app.files.models import versions
from app.webhooks.models import deliveries
from tests import pictures
from tests.emulators.receiver import Received, Receiver
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
TAGGED_EVERY = size(1, 5)


def test_kill_under_load_loses_nothing_and_tells_everything_once(
    tmp_path: Path, database_url: str
) -> None:
    moments = new_seed("kill under load")
    server = ServerProcess(
        tmp_path,
        database_url,
        LOUPE_SYNC_BUDGET_SECONDS="0.1",
        LOUPE_LOCAL_DELAY_SECONDS="aws-auto-tagging=0.3",
        # Uploads come first, and what waits for long is looked at when they have ended.
        LOUPE_READY_MAX_DUE_AGE_SECONDS="86400",
    )
    with Receiver() as receiver, running(server):
        fields = {"extensions": both_extensions(), "webhookUrl": receiver.url}
        with Load(server.url, pictures.jpeg(), fields, TAGGED_EVERY) as load:
            for kill in range(1, KILLS + 1):
                _wait_for_uploads(load, UPLOADS * kill // KILLS)
                time.sleep(moments.uniform(0, 0.3))
                server.kill()
                server.start()
        engine = create_engine(database_url)
        wait_for(lambda: not _unfinished(engine), "all that was due", 600)
        lost, corrupt = _check_files(server, load)
        events = _check_events(engine, load, receiver)
        left = staged_files(tmp_path)
        report(
            f"kill under load on {engine.dialect.name}",
            kills=KILLS,
            acknowledged=len(load.acknowledged),
            refused=len(load.refused),
            cut=load.cut,
            lost=lost,
            corrupt=corrupt,
            staged_files_left=len(left),
            events=events,
            webhooks=len(receiver.requests),
        )
        engine.dispose()
        assert (lost, corrupt, left, load.refused) == (0, 0, [], [])
        assert server.stop() == 0


def _wait_for_uploads(load: Load, wanted: int) -> None:
    wait_for(lambda: len(load.acknowledged) >= wanted, f"{wanted} uploads", 300)


def _unfinished(engine: Engine) -> bool:
    with engine.connect() as connection:
        return any(
            connection.execute(
                select(table.c.id).where(table.c.status == "pending").limit(1)
            ).first()
            for table in (runs, deliveries)
        )


def _check_files(server: ServerProcess, load: Load) -> tuple[int, int]:
    """How many acknowledged files are not there, and how many have other bytes."""
    lost = corrupt = 0
    with httpx.Client(auth=AUTH, base_url=server.url, timeout=60) as client:
        for upload in load.acknowledged:
            details = client.get(f"/v1/files/{upload.file_id}/details")
            content = client.get(upload.url)
            if details.status_code != 200 or content.status_code != 200:
                lost += 1
                continue
            corrupt += hashlib.sha256(content.content).hexdigest() != upload.sha256
            _check_tags(details.json(), set(upload.statuses))
    return lost, corrupt


def _check_tags(details: dict[str, Any], extensions: set[str]) -> None:
    assert details.get("extensionStatus", {}) == dict.fromkeys(extensions, "success")
    tags = [(tag["name"], tag["source"]) for tag in details["AITags"] or ()]
    assert len(tags) == len(set(tags))
    assert {source for _, source in tags} == extensions


def _is_whole(request: Received) -> bool:
    return len(request.body) == int(request.headers["content-length"])


def _check_events(engine: Engine, load: Load, receiver: Receiver) -> int:
    """Every event that was due has come, under one id and with one body. Returns how many."""
    bodies: dict[str, set[bytes]] = {}
    # Of what a kill cut off the receiver has got the beginning only.
    whole = [each for each in receiver.requests if _is_whole(each)]
    for request in whole:
        bodies.setdefault(request.headers["webhook-id"], set()).add(request.body)
    with engine.connect() as connection:
        recorded = connection.execute(select(deliveries)).all()
        blobs = connection.execute(select(versions.c.blob_key)).scalars().all()
    assert bodies == {row.id: {row.body} for row in recorded}
    assert {row.status for row in recorded} == {"delivered"}
    assert len(recorded) == len({row.run_id for row in recorded})
    told = Counter(
        (event["fileObject"]["fileId"], event["service"])
        for event in (orjson.loads(row.body) for row in recorded)
    )
    assert set(told.values()) == {1}
    announced = {
        (upload.file_id, extension)
        for upload in load.acknowledged
        for extension, status in upload.statuses.items()
        if status == "pending"
    }
    assert announced
    assert announced <= set(told)
    assert len(blobs) == len(set(blobs))
    return len(recorded)
