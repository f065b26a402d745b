"""What one process makes due, another takes at once. No poll can explain it: there is none."""

import asyncio
import time
from collections.abc import Callable
from itertools import pairwise

import psycopg
import pytest

from app import jobs, notify
from app.db import Tx
from app.extensions.models import runs
from app.extensions.schemas import GOOGLE
from app.webhooks.models import deliveries
from tests.conftest import Serve
from tests.emulators.receiver import Receiver
from tests.emulators.vision import VisionEmulator
from tests.files.support import (
    all_deliveries,
    upload,
    wait_for_status,
    wait_until,
    wait_until_final,
)
from tests.server import LoupeServer
from tests.test_db import Running, on_postgres

pytestmark = on_postgres

WAIT_SECONDS = 60


def listeners(url: str) -> list[int]:
    """The process ids of the connections that listen now."""
    with psycopg.connect(conninfo(url)) as connection:
        found = connection.execute(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
            " AND state = 'idle' AND query = %s",
            [f"LISTEN {notify.CHANNEL}"],
        )
        return [pid for (pid,) in found]


def end_sessions(url: str, pids: list[int]) -> None:
    with psycopg.connect(conninfo(url)) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s) AS pid", [pids])


def conninfo(url: str) -> str:
    return url.replace("postgresql+psycopg:", "postgresql:")


def wait_for_listeners(url: str, count: int) -> list[int]:
    def those() -> list[int]:
        found = listeners(url)
        return found if len(found) == count else []

    return wait_until(those, "listening", WAIT_SECONDS)


@pytest.fixture(autouse=True)
def _no_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "POLL_SECONDS", 3600.0)


class Pair:
    """asking answers requests and takes nothing that is due; taking is another replica."""

    def __init__(self, asking: LoupeServer, taking: LoupeServer) -> None:
        self.asking = asking
        self.taking = taking


@pytest.fixture
def pair(serve: Serve, database_url: str) -> Pair:
    settings = {"google_auto_tagging": "local", "webhook_schedule": "0"}
    pair = Pair(serve(sync_budget_seconds=0, **settings), serve(**settings))
    pair.asking.resources.stop_claiming()
    wait_for_listeners(database_url, 2)
    return pair


def test_run_given_back_by_one_replica_is_taken_by_another_which_tells_of_it(pair: Pair) -> None:
    with Receiver() as receiver:
        answer = upload(pair.asking, GOOGLE, webhook_url=receiver.url)
        assert answer["extensionStatus"] == {GOOGLE: "pending"}
        wait_for_status(pair.asking, answer["fileId"], GOOGLE, "success")
        receiver.wait_for(1, WAIT_SECONDS)


def test_run_tried_again_through_one_replica_is_taken_by_another(pair: Pair) -> None:
    file_id = upload(pair.asking, GOOGLE)["fileId"]
    wait_for_status(pair.asking, file_id, GOOGLE, "success")
    [run] = pair.asking.client.get("/v1/extension-runs", params={"fileId": file_id}).json()
    again = pair.asking.client.post(f"/v1/extension-runs/{run['id']}/retry")
    assert again.status_code == 201

    def is_done() -> bool:
        found = pair.asking.client.get(f"/v1/extension-runs/{again.json()['id']}").json()
        return bool(found["status"] == "success")

    wait_until(is_done, "run again", WAIT_SECONDS)


def test_delivery_of_one_replica_is_sent_by_another_and_so_is_its_replay(pair: Pair) -> None:
    with Receiver() as receiver:
        # Deleting the file ends its run, and inserts the delivery, in the asking process.
        pair.taking.resources.loops[0].stop()
        answer = upload(pair.asking, GOOGLE, webhook_url=receiver.url)
        pair.asking.client.delete(f"/v1/files/{answer['fileId']}")
        receiver.wait_for(1, WAIT_SECONDS)
        wait_until_final(pair.asking, WAIT_SECONDS)
        [delivery] = all_deliveries(pair.asking)
        replayed = pair.asking.client.post(f"/v1/webhook-deliveries/{delivery.id}/replay")
        assert replayed.status_code == 200
        first, second = receiver.wait_for(2, WAIT_SECONDS)
        assert first.headers["webhook-id"] == second.headers["webhook-id"]


def test_what_a_replica_gives_back_when_it_ends_is_taken_at_once(
    serve: Serve, database_url: str, vision: VisionEmulator
) -> None:
    settings = {"google_auto_tagging": "vision", "sync_budget_seconds": 0.2}
    ending, staying = serve(**settings), serve(**settings)
    wait_for_listeners(database_url, 2)
    vision.hold()
    answer = upload(ending, GOOGLE)
    assert answer["extensionStatus"] == {GOOGLE: "pending"}
    vision.wait_for_calls(1)
    ending.stop()
    vision.wait_for_calls(2, timeout_seconds=WAIT_SECONDS)
    vision.release()
    wait_for_status(staying, answer["fileId"], GOOGLE, "success")


def test_listening_begins_again_after_its_connection_was_cut(
    pair: Pair, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "FIRST_RECONNECT_SECONDS", 0.01)
    cut = wait_for_listeners(database_url, 2)
    end_sessions(database_url, cut)
    # What became due while nobody listened is taken too.
    answer = upload(pair.asking, GOOGLE)
    wait_for_status(pair.asking, answer["fileId"], GOOGLE, "success")
    assert not set(wait_for_listeners(database_url, 2)) & set(cut)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():  # noqa: ASYNC110 (wakers are plain functions)
            await asyncio.sleep(0.01)


def test_many_notifications_wake_a_process_a_few_times(database_url: str) -> None:
    running = Running(database_url)
    woken: list[float] = []

    def tell(tx: Tx) -> None:
        notify.notify_due(tx, runs)

    async def tell_often() -> None:
        wakers = {runs.name: lambda: woken.append(time.monotonic())}
        listening = asyncio.create_task(notify.listen(database_url, wakers))
        await until(lambda: len(woken) > 0)
        for _ in range(200):
            await running.db.write(tell)
        seen = len(woken)
        await running.db.write(tell)
        await until(lambda: len(woken) > seen)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)

    running.run(tell_often())
    running.close()
    assert all(b - a > 0.9 * notify.PAUSE_SECONDS for a, b in pairwise(woken))


def test_notification_comes_with_its_commit_and_with_no_rollback(database_url: str) -> None:
    running = Running(database_url)

    def tell_and_fail(tx: Tx) -> None:
        notify.notify_due(tx, runs)
        raise LookupError

    def tell(tx: Tx) -> None:
        notify.notify_due(tx, deliveries)

    with psycopg.connect(conninfo(database_url), autocommit=True) as connection:
        connection.execute(f"LISTEN {notify.CHANNEL}")
        with pytest.raises(LookupError):
            running.run(running.db.write(tell_and_fail))
        running.run(running.db.write(tell))
        [told] = connection.notifies(timeout=WAIT_SECONDS, stop_after=1)
    assert told.payload == deliveries.name
    running.close()
