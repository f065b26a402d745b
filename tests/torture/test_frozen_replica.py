"""A replica that is frozen: the others go on, and once thawed it changes nothing.

Past its lease, its runs are taken over; within a transaction, its locks are taken from it.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine, create_engine, func, select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from app.extensions.models import provider_states, runs
from app.extensions.schemas import GOOGLE
from app.webhooks.models import deliveries
from tests import pictures
from tests.emulators.receiver import Receiver
from tests.emulators.rekognition import RekognitionEmulator
from tests.emulators.vision import VisionEmulator
from tests.files.support import asking, vendor_environment
from tests.torture.harness import (
    AUTH,
    Load,
    ServerProcess,
    both_extensions,
    new_seed,
    report,
    running,
    wait_for,
)

PUBLIC_URL = "http://127.0.0.1:8000"
TRIES = 500


@contextmanager
def replicas(
    tmp_path: Path, database_url: str, **settings: str
) -> Iterator[tuple[ServerProcess, ServerProcess]]:
    with ExitStack() as stack:
        started = []
        for name in ("first", "second"):
            (tmp_path / name).mkdir()
            server = ServerProcess(
                tmp_path / name,
                f"{database_url}?application_name={name}",
                LOUPE_STORAGE_URL=f"file://{tmp_path}/files",
                LOUPE_PUBLIC_URL=PUBLIC_URL,
                **settings,
            )
            started.append(stack.enter_context(running(server)))
        yield started[0], started[1]


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.postgres
def test_frozen_replica_is_taken_over_and_writes_nothing_when_it_thaws(
    tmp_path: Path, database_url: str
) -> None:
    engine = create_engine(database_url, poolclass=NullPool)
    settings = {
        "LOUPE_SYNC_BUDGET_SECONDS": "2",
        "LOUPE_LOCAL_DELAY_SECONDS": "5",
        "LOUPE_PROVIDER_TIMEOUT_SECONDS": "120",  # so that the late results are successes
    }
    with Receiver() as receiver, replicas(tmp_path, database_url, **settings) as (first, second):
        answer = upload(first, both_extensions(), webhookUrl=receiver.url)
        assert set(answer["extensionStatus"].values()) == {"pending"}
        first.signal(signal.SIGSTOP)
        received = receiver.wait_for(2, timeout_seconds=60)
        stands = details(second, answer)
        assert set(stands["extensionStatus"].values()) == {"success"}
        first.signal(signal.SIGCONT)
        wait_for(lambda: results_in(first) == 2, "the late results", 30)
        first.wait_until_ready()
        assert details(first, answer) == stands
        with engine.connect() as connection:
            assert [run.attempts for run in connection.execute(select(runs))] == [2, 2]
            events = connection.execute(select(deliveries.c.id)).scalars().all()
        assert len(events) == 2
        assert {request.headers["webhook-id"] for request in receiver.requests} == set(events)
        report("frozen replica", webhooks=len(received), late_results=results_in(first))


@pytest.mark.parametrize("database_url", ["postgres"], indirect=True)
@pytest.mark.postgres
def test_replica_that_is_frozen_within_a_transaction_holds_nobody_up(
    tmp_path: Path, database_url: str
) -> None:
    """It holds the row by which all replicas keep to the provider's cap."""
    seed = new_seed("frozen transaction")
    engine = create_engine(database_url, poolclass=NullPool)
    with ExitStack() as stack:
        vision = stack.enter_context(VisionEmulator())
        rekognition = stack.enter_context(RekognitionEmulator())
        settings = {
            **vendor_environment(vision, rekognition),
            "LOUPE_GOOGLE_AUTO_TAGGING": "vision",
            "LOUPE_GOOGLE_MONTHLY_CALLS": "1000000",
            "LOUPE_RESULT_TTL_DAYS": "0",
            "LOUPE_SYNC_BUDGET_SECONDS": "60",
        }
        first, second = stack.enter_context(replicas(tmp_path, database_url, **settings))
        load = Load(first.url, pictures.jpeg(), {"extensions": asking(GOOGLE)})
        with load:
            wait_for(lambda: len(load.acknowledged) > 5, "calls under way")
            freezes = 1
            while not freeze_with_lock(first, engine):
                freezes += 1
                assert freezes < TRIES
                time.sleep(seed.uniform(0, 0.05))
            started = time.monotonic()
            holder = blocking_backend(engine)
            answer = upload(second, asking(GOOGLE))
            seconds = time.monotonic() - started
            assert answer["extensionStatus"] == {GOOGLE: "success"}
            assert not exists(engine, holder)
            before = len(load.acknowledged)
            first.signal(signal.SIGCONT)
            wait_for(lambda: len(load.acknowledged) > before + 5, "uploads after the thaw")
        wait_for(lambda: count(engine, runs.c.status == "pending") == 0, "all runs")
        succeeded = count(engine, runs.c.status == "success") - 1
        # An upload that was refused, since its connection was taken from it, may be stored.
        assert 0 <= succeeded - len(load.acknowledged) <= len(load.refused)
        report("frozen transaction", freezes=freezes, held_up_seconds=round(seconds, 1))


def upload(server: ServerProcess, extensions: str, **fields: str) -> dict[str, Any]:
    answer = httpx.post(
        f"{server.url}/api/v1/files/upload",
        files={"file": ("a.jpg", pictures.jpeg())},
        data={"fileName": "a.jpg", "extensions": extensions, **fields},
        auth=AUTH,
        timeout=90,
    )
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def details(server: ServerProcess, answer: dict[str, Any]) -> Any:
    url = f"{server.url}/v1/files/{answer['fileId']}/details"
    return httpx.get(url, auth=AUTH, timeout=30).json()


def results_in(server: ServerProcess) -> int:
    """How many successes a replica has come to record, whether or not they counted."""
    return server.log.read_text().count('"Succeeded"')


def freeze_with_lock(server: ServerProcess, engine: Engine) -> bool:
    """Whether it now stands still with the provider's row locked; else it goes on."""
    server.signal(signal.SIGSTOP)
    for _ in range(3):  # what PostgreSQL was doing for it is over by then
        if not is_locked(engine):
            server.signal(signal.SIGCONT)
            return False
        time.sleep(0.1)
    return True


def is_locked(engine: Engine) -> bool:
    state = select(provider_states).where(provider_states.c.extension == GOOGLE)
    with engine.connect() as connection:
        try:
            connection.execute(state.with_for_update(nowait=True)).one()
        except OperationalError:
            return True
    return False


def blocking_backend(engine: Engine) -> int:
    """The process of PostgreSQL in which the frozen replica's transaction is open."""
    statement = text(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'first' "
        "AND state = 'idle in transaction'"
    )
    with engine.connect() as connection:
        return int(connection.execute(statement).scalars().all()[0])


def exists(engine: Engine, pid: int) -> bool:
    statement = text("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid")
    with engine.connect() as connection:
        return bool(connection.execute(statement, {"pid": pid}).scalar_one())


def count(engine: Engine, condition: Any) -> int:
    with engine.connect() as connection:
        found: int = connection.execute(select(func.count()).where(condition)).scalar_one()
    return found
