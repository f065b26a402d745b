"""Claiming runs reads one range of an index: what is blocked costs nothing and starves nobody."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import insert, select, text, update

from app import jobs
from app.db import Tx
from app.extensions.models import provider_states, runs
from app.extensions.provider import Reason
from app.extensions.runs import claim_runs
from app.extensions.schemas import AWS, GOOGLE
from tests.test_db import Running, Watched, on_postgres, on_sqlite

BLOCKED = 5_000
SLOTS = 8
INDEX = "ix_extension_runs_due"


@pytest.fixture
def running(database_url: str) -> Iterator[Running]:
    running = Running(database_url)
    yield running
    running.close()


def put(tx: Tx, count: int, name: str, *, due_in: float, leased_for: float | None = None) -> None:
    """Pending runs of each extension, due and perhaps leased so many seconds from now."""
    now = tx.execute(select(tx.now())).scalar_one()
    columns = {
        "file_id": name,
        "version_id": name,
        "min_confidence": 0,
        "max_tags": 1,
        "announced": False,
        "status": "pending",
        "attempts": 0,
        "garbled_replies": 0,
        "request_id": "r",
        "created_at": now,
        "expires_at": now,
        "due_at": now + timedelta(seconds=due_in),
        "lease_until": None if leased_for is None else now + timedelta(seconds=leased_for),
        "lease_owner": None if leased_for is None else "other",
    }
    rows = [
        {**columns, "id": f"{name} {extension} {number}", "extension": extension, "number": number}
        for extension in (GOOGLE, AWS)
        for number in range(count)
    ]
    tx.execute(insert(runs), rows)


def put_a_backlog(tx: Tx) -> None:
    put(tx, BLOCKED, "next month", due_in=86400)
    put(tx, BLOCKED, "being run", due_in=-5, leased_for=15)
    put(tx, 2 * SLOTS, "due", due_in=-1)
    put(tx, 2, "lost", due_in=-9, leased_for=-1)


def claims(tx: Tx) -> list[tuple[str, Any]]:
    """The statements, with their parameters, by which both extensions' runs are claimed."""
    watched = Watched(tx)
    claim_runs(watched, "me", {GOOGLE: SLOTS, AWS: SLOTS}, SLOTS)
    return [each for each in watched.statements if "UPDATE extension_runs" in each[0]]


def write(running: Running, function: Any) -> Any:
    return running.run(running.db.write(function))


def test_blocked_runs_in_front_starve_nobody(running: Running) -> None:
    write(running, put_a_backlog)
    found = [
        write(running, lambda tx: claim_runs(tx, "me", {GOOGLE: SLOTS, AWS: SLOTS}, SLOTS))
        for _ in range(3)
    ]
    names = [sorted({run.file_id for run in claimed}) for claimed in found]
    assert names == [["due", "lost"], ["due"], ["due"]]
    assert [len(claimed) for claimed in found] == [2 * SLOTS, 2 * SLOTS, 4]


def test_provider_that_is_held_back_starves_nobody(running: Running) -> None:
    def hold_back(tx: Tx) -> None:
        put(tx, BLOCKED, "due", due_in=-1)
        state = {"failures_in_row": 5, "cooldown_seconds": 2, "opened_for": Reason.UNAVAILABLE}
        tx.execute(insert(provider_states).values(extension=GOOGLE, **state))
        tx.execute(update(provider_states).values(opened_until=tx.now(60)))

    write(running, hold_back)
    claimed = write(running, lambda tx: claim_runs(tx, "me", {GOOGLE: SLOTS, AWS: SLOTS}, SLOTS))
    assert [run.extension for run in claimed] == [AWS] * SLOTS


@on_sqlite
def test_next_due_run_is_found_by_an_index_of_its_own_on_sqlite(running: Running) -> None:
    def explain(tx: Tx) -> list[str]:
        watched = Watched(tx)
        jobs.seconds_to_next_due(watched, runs)
        [(statement, parameters)] = watched.statements
        steps = tx.execute_driver(f"EXPLAIN QUERY PLAN {statement}", parameters)
        return [detail for *_, detail in steps if "extension_runs" in detail]

    found = "SEARCH extension_runs USING INDEX ix_extension_runs_next_due (status=?)"
    assert write(running, explain) == [found]


@on_sqlite
def test_claim_searches_the_index_on_sqlite(running: Running) -> None:
    write(running, put_a_backlog)

    def explain(tx: Tx) -> list[str]:
        return [
            detail
            for statement, parameters in claims(tx)
            for *_, detail in tx.execute_driver(f"EXPLAIN QUERY PLAN {statement}", parameters)
            if "extension_runs USING INDEX" in detail or "TEMP" in detail
        ]

    search = f"SEARCH extension_runs USING INDEX {INDEX} (status=? AND extension=? AND "
    lost, due = f"{search}lease_until<?)", f"{search}lease_until=? AND due_at<?)"
    assert write(running, explain) == [lost, due] * 2


@on_postgres
def test_claim_reads_no_blocked_row_on_postgres(running: Running) -> None:
    write(running, put_a_backlog)

    def explain(tx: Tx) -> list[dict[str, Any]]:
        tx.execute(text("ANALYZE extension_runs"))
        return [
            scan
            for statement, parameters in claims(tx)
            for scan in scans(
                tx.execute_driver(
                    f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters
                ).fetchone()[0][0]["Plan"]
            )
        ]

    found = write(running, explain)
    searches = [scan for scan in found if scan.get("Index Name") == INDEX]
    assert len(searches) == 4
    assert all("lease_until" in scan["Index Cond"] for scan in searches)
    assert sum("due_at" in scan["Index Cond"] for scan in searches) == 2
    assert all(scan.get("Rows Removed by Filter", 0) == 0 for scan in found)
    assert all(scan["Actual Rows"] <= 2 * SLOTS for scan in found)


def scans(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each node of a plan that reads the table or one of its indexes."""
    if plan.get("Relation Name") == "extension_runs" or "Index Name" in plan:
        yield plan
    for part in plan.get("Plans", []):
        yield from scans(part)
