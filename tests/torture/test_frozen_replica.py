"""A replica that is frozen past its lease: the other takes over, the thawed one changes nothing."""

import signal
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Engine, create_engine, select, text

from app.extensions.models import runs
from app.webhooks.models import deliveries
from tests import pictures
from tests.emulators.receiver import Receiver
from tests.torture.harness import AUTH, ServerProcess, both_extensions, report, running, wait_for


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.postgres
def test_frozen_replica_is_taken_over_and_writes_nothing_when_it_thaws(
    tmp_path: Path, database_url: str
) -> None:
    settings = {
        "LOUPE_SYNC_BUDGET_SECONDS": "0.1",
        "LOUPE_LOCAL_DELAY_SECONDS": "2",
        "LOUPE_STORAGE_URL": f"file://{tmp_path}/files",
    }
    first = ServerProcess(tmp_path / "first", database_url, **settings)
    second = ServerProcess(tmp_path / "second", database_url, **settings)
    for each in (first, second):
        each.directory.mkdir()
    with Receiver() as receiver, running(first), running(second):
        answer = httpx.post(
            f"{first.url}/api/v1/files/upload",
            files={"file": ("a.jpg", pictures.jpeg())},
            data={
                "fileName": "a.jpg",
                "extensions": both_extensions(),
                "webhookUrl": receiver.url,
            },
            auth=AUTH,
            timeout=30,
        ).json()
        assert set(answer["extensionStatus"].values()) == {"pending"}
        first.signal(signal.SIGSTOP)
        received = receiver.wait_for(2, timeout_seconds=45)
        details = httpx.get(
            f"{second.url}/v1/files/{answer['fileId']}/details", auth=AUTH, timeout=30
        ).json()
        assert set(details["extensionStatus"].values()) == {"success"}
        first.signal(signal.SIGCONT)
        first.wait_until_ready()
        engine = create_engine(database_url)
        wait_for(lambda: not _idle_transactions(engine), "frozen transactions to end", 30)
        again = httpx.get(
            f"{first.url}/v1/files/{answer['fileId']}/details", auth=AUTH, timeout=30
        ).json()
        assert again == details
        assert len({request.headers["webhook-id"] for request in receiver.requests}) == 2
        with engine.connect() as connection:
            assert len(connection.execute(select(deliveries)).all()) == 2
            attempts = [run.attempts for run in connection.execute(select(runs))]
        engine.dispose()
        assert attempts == [2, 2]
        report("frozen replica", webhooks=len(received), attempts=sum(attempts))


def _idle_transactions(engine: Engine) -> int:
    with engine.connect() as connection:
        count: int = connection.execute(
            text("SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'")
        ).scalar_one()
    return count
