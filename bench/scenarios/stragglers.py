"""Ten thousand runs wait, and answers come at twenty a second: how soon is each told by webhook?

And what an idle replica costs while as many wait for later.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median

from sqlalchemy import insert

from app.db import migration_engine
from app.extensions.models import runs
from app.ids import new_id
from app.jobs import PENDING
from bench import process
from bench.emulators import PREFIX, emulating
from bench.findings import Bench, Finding, Goal, absolute
from bench.loupe import file_id, fill, migrate, serving, sqlite_url
from bench.process import BenchFailed, wait_for
from tests.postgres import is_available, running_postgres

PENDING_RUNS = 10_000
ANSWERS_PER_SECOND = 20
SLOTS = 8  # calls that Loupe makes at once in the background, half of what the setting allows
EXTENSION = "google-auto-tagging"
SECONDS_PER_SECOND = 4  # of an ordinary round, so that there are enough answers for a p99
FIRST_SECONDS = 30.0
IDLE = Goal(1, 0.3, lower_is_better=True)


def run(bench: Bench) -> Iterator[Finding]:
    seconds = bench.seconds * SECONDS_PER_SECOND
    migrate(bench.directory)
    fill(sqlite_url(bench.directory), PENDING_RUNS, bench.pictures["100k"], bench.directory)
    with receiving() as (url, delays):
        _insert_runs(sqlite_url(bench.directory), datetime.now(UTC), url)
        rounds = [_delays(bench, delays, seconds) for _ in range(bench.rounds)]
    goal = Goal(1, 0.1, lower_is_better=True)
    p99s = [sorted(each)[int(len(each) * 0.99)] for each in rounds]
    rate = median(len(each) / seconds for each in rounds)
    finding = absolute("stragglers", "from answer to webhook, p99", goal, p99s, "s")
    yield replace(finding, loupe=f"{rate:.0f} answers/s")
    yield from _idle(bench, seconds)


def _insert_runs(url: str, due_at: datetime, webhook_url: str) -> None:
    """One on each file."""
    engine = migration_engine(url)
    with engine.begin() as connection:
        connection.execute(
            insert(runs),
            [_run(number, due_at, webhook_url) for number in range(1, PENDING_RUNS + 1)],
        )
    engine.dispose()


def _run(number: int, due_at: datetime, webhook_url: str) -> dict[str, object]:
    return {
        "id": new_id(),
        "file_id": file_id(number),
        "version_id": file_id(number),
        "extension": EXTENSION,
        "number": 1,
        "min_confidence": 0.0,
        "max_tags": 10,
        "webhook_url": webhook_url,
        "announced": True,
        "status": PENDING,
        "attempts": 0,
        "garbled_replies": 0,
        "due_at": due_at,
        "request_id": "bench",
        "created_at": due_at,
        "expires_at": due_at + timedelta(days=1),
    }


def _delays(bench: Bench, received: list[float], seconds: int) -> list[float]:
    """From answer to webhook, in seconds, of those that come within the time after the first."""
    with emulating(bench.directory, SLOTS / ANSWERS_PER_SECOND) as vendors:
        settings = {**vendors.loupe_settings, "LOUPE_WEBHOOK_ALLOW_CIDRS": "127.0.0.0/8"}
        with serving(bench.directory, **settings):
            received.clear()
            wait_for(lambda: bool(received), "the first webhook", FIRST_SECONDS)
            received.clear()
            time.sleep(seconds)
            delays = list(received)
    if not delays:
        raise BenchFailed(f"No webhook came within {seconds} s.")
    return delays


@contextmanager
def receiving() -> Iterator[tuple[str, list[float]]]:
    """A webhook receiver: its URL, and how old each answer was when its webhook came."""
    delays: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            delays.extend(_ages(body, time.monotonic()))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/webhook", delays
        server.shutdown()


def _ages(body: bytes, now: float) -> Iterator[float]:
    """The clock is one for all processes of a machine."""
    for tag in json.loads(body)["fileObject"]["AITags"]:
        if tag["name"].startswith(PREFIX):
            yield now - float(tag["name"].removeprefix(PREFIX))


# --- Idle ----------------------------------------------------------------------------------------


def _idle(bench: Bench, seconds: int) -> Iterator[Finding]:
    with _databases(bench) as databases:
        for name, url in databases.items():
            directory = bench.directory / name
            directory.mkdir()
            migrate(directory, LOUPE_DATABASE_URL=url)
            fill(url, PENDING_RUNS, bench.pictures["100k"])
            _insert_runs(url, datetime.now(UTC) + timedelta(days=1), "http://127.0.0.1:9/never")
            with serving(directory, LOUPE_DATABASE_URL=url) as loupe:
                shares = [_cpu_percent(loupe.pid, seconds) for _ in range(bench.rounds)]
            yield absolute("stragglers", f"CPU of an idle replica, {name}", IDLE, shares, "%")


@contextmanager
def _databases(bench: Bench) -> Iterator[dict[str, str]]:
    """URLs by name."""
    sqlite = {"SQLite": f"sqlite:///{bench.directory / 'SQLite' / 'loupe.db'}"}
    if not is_available():
        bench.left_out["PostgreSQL"] = "Its server's binaries are not installed."
        yield sqlite
        return
    with running_postgres() as server:
        yield {**sqlite, "PostgreSQL": server.create("idle")}


def _cpu_percent(pid: int, seconds: int) -> float:
    """Of one core, by all its processes."""
    family = process.family(pid)
    before = sum(map(process.cpu_seconds, family))
    time.sleep(seconds)
    return (sum(map(process.cpu_seconds, family)) - before) / seconds * 100
