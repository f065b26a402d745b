"""`python -m bench.scale`: uploads and claims, counted, on a PostgreSQL of its own.

Clients, servers and PostgreSQL share this machine, so the CPU that one upload costs says more than
the uploads in a second. Set LOUPE_TEST_POSTGRES_URL to measure another PostgreSQL.
"""

import asyncio
import http.client
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from sqlalchemy import insert

from app import jobs, schema
from app.clock import Clock
from app.db import Database, Tx, open_database
from app.extensions.models import runs
from app.extensions.outcomes import Succeeded
from app.extensions.runs import claim_runs, finish_run
from app.extensions.schemas import GOOGLE
from app.ids import new_id
from app.settings import Settings, load_settings
from app.webhooks.deliveries import claim_deliveries, record_attempt
from app.webhooks.models import deliveries
from tests import pictures
from tests.postgres import running_postgres
from tests.torture.harness import AUTH, ServerProcess

SECONDS = float(os.environ.get("BENCH_SECONDS", "10"))
CLIENTS = 16
ROWS = 2000
BATCH = 8
TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Used by a process until now, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def upload_until(server: ServerProcess, ends_at: float, done: list[int]) -> None:
    request = httpx.Request(
        "POST",
        server.url,
        files={"file": ("picture.jpg", pictures.jpeg())},
        data={"fileName": "picture.jpg"},
    )
    body = request.read()
    credentials = next(httpx.BasicAuth(*AUTH).auth_flow(request)).headers["authorization"]
    headers = {"authorization": credentials, "content-type": request.headers["content-type"]}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    while time.monotonic() < ends_at:
        connection.request("POST", "/api/v1/files/upload", body, headers)
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        done.append(1)
    connection.close()


def measure_uploads(database_url: str, directory: Path, replicas: int) -> None:
    with ExitStack() as stack:
        servers = []
        for number in range(replicas):
            (directory / f"{number}").mkdir(parents=True)
            server = ServerProcess(
                directory / f"{number}", database_url, LOUPE_STORAGE_URL=f"file://{directory}/files"
            )
            stack.callback(server.end)
            server.start()
            servers.append(server)
        pids = [server.process.pid for server in servers if server.process]
        before = sum(map(cpu_seconds, pids))
        ends_at, done = time.monotonic() + SECONDS, list[int]()
        threads = [
            threading.Thread(target=upload_until, args=(servers[n % replicas], ends_at, done))
            for n in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        used = sum(map(cpu_seconds, pids)) - before
    print(
        f"{replicas} replica(s): {len(done) / SECONDS:.0f} uploads/s, "
        f"{1000 * used / len(done):.1f} ms of a replica's CPU for each"
    )


@contextmanager
def timed(what: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    print(f"{what}: {ROWS / (time.monotonic() - begun):.0f}/s claimed and ended")


def add_rows(tx: Tx) -> None:
    """Due runs, and due deliveries to a hundred hosts."""
    common = {"status": jobs.PENDING, "attempts": 0, "due_at": tx.clock.now(), "request_id": "r"}
    now = {"created_at": tx.clock.now()}
    run = {
        "file_id": "f",
        "version_id": "v",
        "extension": GOOGLE,
        "min_confidence": 0.0,
        "max_tags": 1,
        "announced": True,
        "garbled_replies": 0,
        "expires_at": tx.clock.now(),
    }
    rows = range(ROWS)
    tx.execute(insert(runs), [{"id": new_id(), "number": n, **common, **now, **run} for n in rows])
    delivery = {"url": "http://h", "body": b"{}"}
    tx.execute(
        insert(deliveries),
        [
            {"id": new_id(), "run_id": f"{n}", "host": f"h{n % 100}", **common, **now, **delivery}
            for n in rows
        ],
    )


async def measure_claims(db: Database) -> None:
    await db.write(add_rows)
    with timed("runs"):
        while rows := await db.write(claim_runs, "bench", {GOOGLE: BATCH}, BATCH):
            ended = (db.write(finish_run, r.id, r.attempts, Succeeded([], "p", 0)) for r in rows)
            await asyncio.gather(*ended)
    attempt: dict[str, Any] = {
        "started_at": db.clock.now(),
        "elapsed_ms": 0,
        "status_code": 200,
        "error": None,
        "reply_beginning": b"",
        "retry_after": None,
    }
    with timed("deliveries"):
        while rows := await db.write(claim_deliveries, "bench", {}, 64):
            sent = (db.write(record_attempt, r.id, r.attempts, (0.0,), **attempt) for r in rows)
            await asyncio.gather(*sent)
    await db.close()


def main() -> None:
    name = f"bench-{uuid4()}"
    with running_postgres() as postgres, tempfile.TemporaryDirectory() as directory:
        url = postgres.create(name)
        schema.upgrade(url)
        for replicas in (1, 2):
            measure_uploads(url, Path(directory) / str(replicas), replicas)
        settings = load_settings(Settings, database_url=url)
        asyncio.run(measure_claims(open_database(settings, Clock())))
        postgres.drop(name)


if __name__ == "__main__":
    main()
